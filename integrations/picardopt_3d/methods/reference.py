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

    def losses(self, render: Render, step: int) -> dict[str, Tensor]:
        """Returns the mean squared differences from the picture ("rgb", over white) and from its alpha ("mask").

        Args:
            render: The scene over white, at `camera` and in `size(step)`.
            step: The step.
        """
        rgb, alpha = self._pictures[self.size(step)]
        return {
            "rgb": (render.rgb - rgb).square().mean(),
            "mask": (render.opacity - alpha).square().mean(),
        }
