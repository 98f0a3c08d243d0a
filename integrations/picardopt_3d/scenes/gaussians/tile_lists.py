"""Pictures cut into square tiles, and for each tile the Gaussians that can reach it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TILE = 8
"""Pixels along a tile's edge."""

PIXELS = TILE * TILE
"""Pixels of a tile."""


class Grid:
    """The tiles of a batch of pictures, numbered by picture, row and column.

    Attributes:
        views: Pictures.
        rows: Rows of tiles.
        columns: Columns of tiles.
    """

    def __init__(self, views: int, height: int, width: int) -> None:
        self.views, self.height, self.width = views, height, width
        self.rows, self.columns = -(-height // TILE), -(-width // TILE)

    @property
    def count(self) -> int:
        """Tiles of all pictures."""
        return self.views * self.rows * self.columns

    def untile(self, tiles: Tensor) -> Tensor:
        """Returns the pictures that tiles make up.

        Args:
            tiles: Pixels of the tiles, row after row. [count, PIXELS, channels]

        Returns:
            Pictures. [views, channels, height, width]
        """
        shape = (self.views, self.rows, self.columns, TILE, TILE, tiles.shape[-1])
        whole = tiles.view(shape).permute(0, 5, 1, 3, 2, 4)
        whole = whole.reshape(self.views, tiles.shape[-1], self.rows * TILE, self.columns * TILE)
        return whole[..., : self.height, : self.width].contiguous()

    def tile(self, pictures: Tensor) -> Tensor:
        """Returns the tiles of pictures, 0 outside of them: the reverse of `untile`."""
        beyond = (0, self.columns * TILE - self.width, 0, self.rows * TILE - self.height)
        whole = functional.pad(pictures, beyond)
        shape = (self.views, pictures.shape[1], self.rows, TILE, self.columns, TILE)
        whole = whole.view(shape).permute(0, 2, 4, 3, 5, 1)
        return whole.reshape(self.count, PIXELS, pictures.shape[1])

    def monomials(self, like: Tensor) -> Tensor:
        """Returns 1, x, y, xx, xy and yy of a tile's pixels, from the centre of the tile: `[PIXELS, 6]`."""
        places = torch.arange(TILE, dtype=like.dtype, device=like.device) - (TILE - 1) / 2
        y, x = (grid.reshape(-1) for grid in torch.meshgrid(places, places, indexing="ij"))
        return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)

    def centres(self, like: Tensor) -> Tensor:
        """Returns the centres of the tiles, pixels (column, row): `[count, 2]`."""
        place = torch.arange(self.rows * self.columns, device=like.device)
        pairs = torch.stack([place % self.columns, place // self.columns], dim=-1)
        return (TILE * pairs.to(like.dtype) + TILE / 2).repeat(self.views, 1)


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


def list_tiles(grid: Grid, means2d: Tensor, depths: Tensor, extents: Tensor) -> TileLists:
    """Lists for each tile the Gaussians whose box holds the centre of one of its pixels.

    Gaussians at the same depth are in the order of their rows.

    Args:
        grid: The tiles.
        means2d: Centres, pixels. [views, count, 2]
        depths: Distances along the camera's axis. [views, count]
        extents: Half the edges of their boxes, pixels; 0: not seen. [views, count, 2]
    """
    views, count = depths.shape
    device = depths.device
    order = depths.argsort(dim=1, stable=True)
    order = (order + count * torch.arange(views, device=device)[:, None]).view(-1)
    centre = means2d.reshape(-1, 2).index_select(0, order)
    extent = extents.reshape(-1, 2).index_select(0, order)
    last = centre.new_tensor([grid.width - 1, grid.height - 1])
    first_pixel = (centre - extent - 0.5).ceil().clamp_min(0)
    last_pixel = torch.minimum((centre + extent - 0.5).floor(), last)
    seen = ((extent > 0) & (first_pixel <= last_pixel)).all(-1)
    first = (first_pixel[seen] / TILE).floor().long()
    spans = (last_pixel[seen] / TILE).floor().long() - first + 1  # [seen, 2]
    order = order[seen]
    sizes = spans[:, 0] * spans[:, 1]
    which = torch.repeat_interleave(torch.arange(len(order), device=device), sizes)
    place = torch.arange(len(which), device=device) - (sizes.cumsum(0) - sizes)[which]
    wide = spans[:, 0][which]
    row = torch.div(place, wide, rounding_mode="floor")
    column = first[:, 0][which] + place - row * wide
    row += first[:, 1][which]
    rows = order[which]
    tiles = (
        torch.div(rows, count, rounding_mode="floor") * grid.rows + row
    ) * grid.columns + column
    tiles, sorting = tiles.sort(stable=True)
    return TileLists(rows[sorting], tiles, torch.bincount(tiles, minlength=grid.count))
