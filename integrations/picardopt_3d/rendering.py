"""Many views of a scene, a few at a time to bound memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import Render, Scene

PIXELS_AT_ONCE = 1 << 14
"""Pixels that are rendered in one call, at least one view."""


def render_in_parts(
    scene: Scene,
    cameras: Cameras,
    size: int,
    *,
    normals: bool = False,
    background: tuple[float, float, float] | None = None,
    step: int | None = None,
    at_once: int | None = None,
) -> Iterator[Render]:
    """Renders views without gradients and yields them in parts.

    Args:
        scene: What to render.
        cameras: Where the views are taken from.
        size: Pixels along each edge.
        normals: Whether to render normals too.
        background: Colour behind the object; None: the scene's own background.
        step: Step of the run, for what comes in progressively; None: a finished scene.
        at_once: Views in each part; None: as many as have `PIXELS_AT_ONCE` pixels.
    """
    at_once = at_once or max(1, PIXELS_AT_ONCE // size**2)
    for start in range(0, len(cameras), at_once):
        part = cameras[start : start + at_once].to(scene.device)
        plain = None if background is None else torch.tensor([background] * len(part))
        with torch.no_grad():
            yield scene.render(
                part,
                size,
                normals=normals,
                background=None if plain is None else plain.to(scene.device),
                step=step,
            )


def render_rgb(
    scene: Scene,
    cameras: Cameras,
    size: int,
    background: tuple[float, float, float] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Renders the colours of views.

    Args:
        scene: What to render.
        cameras: Where the views are taken from.
        size: Pixels along each edge.
        background: Colour behind the object; None: the scene's own background.
        progress: Called with the number of views after each part.

    Returns:
        RGB in [0, 1], on the CPU. [views, 3, size, size]
    """
    views = []
    for render in render_in_parts(scene, cameras, size, background=background):
        views.append(render.rgb.clamp(0, 1).cpu())
        if progress is not None:
            progress(len(views[-1]))
    return torch.cat(views)
