"""The comparison of a scene with the picture that it is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from picardopt_3d.images import ReferenceImage
from picardopt_3d.methods.schedules import Milestones, current
from picardopt_3d.scenes import Render


class Reference:
    """The picture of a run, in the sizes that its steps need.

    Args:
        image: The picture.
        sizes: Pixels along each edge: a number, or (first step, number) pairs.
        device: Device of the scene.

    Attributes:
        camera: Where the picture was taken from, a batch of one.
    """

    def __init__(self, image: ReferenceImage, sizes: Milestones, device: torch.device) -> None:
        self.camera, self._sizes = image.camera.to(device), sizes
        self._pictures = {}
        for size in [sizes] if isinstance(sizes, int) else [size for _, size in sizes]:
            colour, alpha = image.at(size)
            self._pictures[size] = colour[None].to(device), alpha[None].to(device)

    def size(self, step: int) -> int:
        """Returns the number of pixels along each edge at a step."""
        return current(self._sizes, step)

    def losses(self, render: Render, step: int, where: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the mean squared differences from the picture ("rgb", over white) and from its alpha ("mask").

        Args:
            render: The scene over white, at `camera` and in `size(step)`.
            step: The step.
            where: 1 at the pixels that are compared, 0 at others, whose differences count as none,
                `[1, 1, height, width]`; None: all are.
        """
        rgb, alpha = self._pictures[self.size(step)]
        each = {"rgb": render.rgb - rgb, "mask": render.opacity - alpha}
        if where is not None:
            each = {name: difference * where for name, difference in each.items()}
        return {name: difference.square().mean() for name, difference in each.items()}
