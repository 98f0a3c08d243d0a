"""Renders in tiles, so that memory stays bounded: groups of views, each cut into strips of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.scenes.views import Render


def tiles_of(shape: Sequence[int], rays: int) -> list[list[tuple[slice, slice]]]:
    """Cuts views into tiles.

    Args:
        shape: Batch, height and width of the views.
        rays: Largest number of rays in a tile (which has at least one row of one view).

    Returns:
        Groups of views, each a list of strips from top to bottom: (views, rows).
    """
    batch, height, width = shape
    views, rows = max(1, rays // (height * width)), max(1, rays // width)
    return [
        [(slice(first, first + views), slice(top, top + rows)) for top in range(0, height, rows)]
        for first in range(0, batch, views)
    ]


def joined(views: Sequence[Sequence[Render]], counts: Sequence[int]) -> Render:
    """Joins the renders of tiles.

    Args:
        views: Groups of views, each cut into strips from top to bottom, as `tiles_of` returns them.
        counts: Number of samples of each tile, in the same order.
    """
    tiles = [tile for strips in views for tile in strips]

    def images(name: str) -> Any:
        if getattr(tiles[0], name) is None:
            return None
        return torch.cat([torch.cat([getattr(s, name) for s in strips], 2) for strips in views])

    def average(name: str, weights: Sequence[float]) -> Tensor | None:
        values = [getattr(tile, name) for tile in tiles]
        if values[0] is None:
            return None
        total: Tensor = sum(value * weight for value, weight in zip(values, weights, strict=True))
        return total / max(1.0, sum(weights))

    seen = [float((tile.opacity > 0).sum()) for tile in tiles]
    return Render(
        rgb=images("rgb"),
        opacity=images("opacity"),
        depth=images("depth"),
        normal=images("normal"),
        orientation_penalty=average("orientation_penalty", seen),
        eikonal=average("eikonal", [float(count) for count in counts]),
    )
