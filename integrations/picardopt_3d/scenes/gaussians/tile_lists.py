"""Pictures cut into square tiles, and for each tile the Gaussians that can reach it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.scenes.gaussians.projection import LEAST_ALPHA

_SMALL_PICTURE = 48
"""Pictures up to this many pixels along an edge have tiles of 4 pixels, larger ones of 8."""

_PAIRS = 1 << 18
"""(Gaussian, tile) pairs that are listed at once, if one row of tiles does not have more."""

_LOG_LEAST = math.log(LEAST_ALPHA) - 0.01
"""The logarithm of the least alpha, with room for rounding."""


class Grid:
    """The tiles of a batch of pictures, numbered by picture, row and column.

    Attributes:
        views: Pictures.
        edge: Pixels along a tile's edge.
        pixels: Pixels of a tile.
        rows: Rows of tiles.
        columns: Columns of tiles.
    """

    def __init__(self, views: int, height: int, width: int) -> None:
        self.views, self.height, self.width = views, height, width
        self.edge = 4 if max(height, width) <= _SMALL_PICTURE else 8
        self.pixels = self.edge * self.edge
        self.rows, self.columns = -(-height // self.edge), -(-width // self.edge)

    @property
    def count(self) -> int:
        """Tiles of all pictures."""
        return self.views * self.rows * self.columns

    def join(self, tiles: Tensor) -> Tensor:
        """Returns the pictures that tiles make up.

        Args:
            tiles: Pixels of the tiles, row after row. [count, pixels, channels]

        Returns:
            Pictures. [views, channels, height, width]
        """
        shape = (self.views, self.rows, self.columns, self.edge, self.edge, tiles.shape[-1])
        whole = tiles.view(shape).permute(0, 5, 1, 3, 2, 4)
        whole = whole.reshape(
            self.views, tiles.shape[-1], self.rows * self.edge, self.columns * self.edge
        )
        return whole[..., : self.height, : self.width].contiguous()

    def cut(self, pictures: Tensor) -> Tensor:
        """Returns the tiles of pictures, 0 outside of them: the reverse of `join`."""
        beyond = (0, self.columns * self.edge - self.width, 0, self.rows * self.edge - self.height)
        whole = functional.pad(pictures, beyond)
        shape = (self.views, pictures.shape[1], self.rows, self.edge, self.columns, self.edge)
        whole = whole.view(shape).permute(0, 2, 4, 3, 5, 1)
        return whole.reshape(self.count, self.pixels, pictures.shape[1])

    def monomials(self, like: Tensor) -> Tensor:
        """Returns 1, x, y, xx, xy and yy of a tile's pixels, from the centre of the tile: `[pixels, 6]`."""
        places = torch.arange(self.edge, dtype=like.dtype, device=like.device) - (self.edge - 1) / 2
        y, x = (grid.reshape(-1) for grid in torch.meshgrid(places, places, indexing="ij"))
        return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)

    def centres(self, like: Tensor) -> Tensor:
        """Returns the centres of the tiles, pixels (column, row): `[count, 2]`."""
        place = torch.arange(self.rows * self.columns, device=like.device)
        pairs = torch.stack([place % self.columns, place // self.columns], dim=-1)
        return (self.edge * pairs.to(like.dtype) + self.edge / 2).repeat(self.views, 1)


class Boxes(NamedTuple):
    """The boxes of tiles that Gaussians can reach; those that reach no pixel have none.

    Attributes:
        rows: Gaussians as rows of [views * count], picture after picture, from front to back. [boxes]
        first: First row of tiles, counted over all pictures. [boxes]
        last: Last row of tiles. [boxes]
        left: First column of tiles. [boxes]
        wide: Columns of tiles. [boxes]
    """

    rows: Tensor
    first: Tensor
    last: Tensor
    left: Tensor
    wide: Tensor


class TileLists(NamedTuple):
    """For each tile the Gaussians that can reach it, from front to back.

    Attributes:
        rows: Gaussians as rows of [views * count], tile after tile. [pairs]
        tiles: The tile of each. [pairs]
        counts: How many each tile has. [tiles of the grid]
    """

    rows: Tensor
    tiles: Tensor
    counts: Tensor


def find_boxes(grid: Grid, means2d: Tensor, depths: Tensor, extents: Tensor) -> Boxes:
    """Returns the boxes of Gaussians, sorted by depth; those at the same depth are in the order of their rows.

    Args:
        grid: The tiles.
        means2d: Centres, pixels. [views, count, 2]
        depths: Distances along the camera's axis. [views, count]
        extents: Half the edges of the boxes in which they are drawn, pixels; 0: not seen. [views, count, 2]
    """
    views, count = depths.shape
    view = torch.arange(views, device=depths.device)[:, None]
    rows = (depths.argsort(dim=1, stable=True) + count * view).view(-1)
    centre = means2d.reshape(-1, 2).index_select(0, rows)
    extent = extents.reshape(-1, 2).index_select(0, rows)
    edge = centre.new_tensor([grid.width - 1, grid.height - 1])
    first = (centre - extent - 0.5).ceil().clamp_min(0)  # the first pixel with its centre inside
    last = torch.minimum((centre + extent - 0.5).floor(), edge)
    seen = ((extent > 0) & (first <= last)).all(-1)
    rows = rows[seen]
    left, top = (first[seen] / grid.edge).long().unbind(-1)
    right, bottom = (last[seen] / grid.edge).long().unbind(-1)
    above = torch.div(rows, max(1, count), rounding_mode="floor") * grid.rows
    return Boxes(rows, above + top, above + bottom, left, right - left + 1)


def split_bands(grid: Grid, boxes: Boxes) -> list[tuple[int, int]]:
    """Returns ranges of rows of tiles with a bounded number of (Gaussian, tile) pairs each, at least one row each."""
    strips = grid.views * grid.rows
    changes = boxes.wide.new_zeros(strips + 1)
    changes.index_add_(0, boxes.first, boxes.wide)
    changes.index_add_(0, boxes.last + 1, -boxes.wide)
    pairs = changes.cumsum(0).tolist()
    bands, start, held = [], 0, 0
    for strip in range(strips):
        if held and held + pairs[strip] > _PAIRS:
            bands.append((start, strip))
            start, held = strip, 0
        held += pairs[strip]
    return [*bands, (start, strips)]


def list_tiles(grid: Grid, gaussians: Tensor, boxes: Boxes, band: tuple[int, int]) -> TileLists:
    """Lists for each tile of a band the Gaussians that can reach it.

    Args:
        grid: The tiles.
        gaussians: The Gaussians, from `gaussian_rows`. [views * count, 6 + channels]
        boxes: Their boxes.
        band: First and last row of tiles (excluded), counted over all pictures.
    """
    first, last = boxes.first.clamp_min(band[0]), boxes.last.clamp_max(band[1] - 1)
    sizes = (last - first + 1).clamp_min(0) * boxes.wide
    device = sizes.device
    which = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    each = torch.stack([first, boxes.left, boxes.wide, boxes.rows, sizes.cumsum(0) - sizes], dim=-1)
    top, left, wide, rows, start = each.index_select(0, which).unbind(-1)
    place = torch.arange(len(which), device=device) - start
    down = torch.div(place, wide, rounding_mode="floor")
    tiles = (top + down) * grid.columns + left + place - down * wide
    kept = _reaching(grid, gaussians, rows, tiles)
    rows, tiles = rows[kept], tiles[kept]
    tiles, order = tiles.sort(stable=True)
    return TileLists(rows[order], tiles, torch.bincount(tiles, minlength=grid.count))


def _reaching(grid: Grid, gaussians: Tensor, rows: Tensor, tiles: Tensor) -> Tensor:
    """Returns which Gaussians can cover `LEAST_ALPHA` of a pixel of a tile: their boxes hold more tiles than that.

    Args:
        grid: The tiles.
        gaussians: The Gaussians, from `gaussian_rows`. [views * count, 6 + channels]
        rows: Gaussians. [pairs]
        tiles: A tile for each. [pairs]
    """
    each = gaussians[:, :6].index_select(0, rows)
    off = grid.centres(gaussians).index_select(0, tiles) - each[:, :2]
    half = 0.5 * (grid.edge - 1)
    low_x, low_y = (off - half).unbind(-1)
    high_x, high_y = (off + half).unbind(-1)
    xx, xy, yy, log_opacity = each[:, 2:].unbind(-1)
    # From outside, the largest alpha is on one of the two edges that face the centre.
    x, y = low_x.clamp_min(0) + high_x.clamp_max(0), low_y.clamp_min(0) + high_y.clamp_max(0)
    along_y = torch.minimum(torch.maximum(-xy / yy * x, low_y), high_y)
    along_x = torch.minimum(torch.maximum(-xy / xx * y, low_x), high_x)
    one = x * (xx * x + 2 * xy * along_y) + yy * along_y * along_y
    other = y * (yy * y + 2 * xy * along_x) + xx * along_x * along_x
    return 0.5 * torch.minimum(one, other) <= log_opacity - _LOG_LEAST
