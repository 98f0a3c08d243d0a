"""The Gaussians of all tiles in a form that one matrix product evaluates, and their gradients back in the usual one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from picardopt_3d.scenes.gaussians.projection import BLUR, LEAST_ALPHA
from picardopt_3d.scenes.gaussians.tile_lists import Grid, TileLists

MOST_ALPHA = 0.999
"""What a Gaussian covers of a pixel at most."""

_ELEMENTS = 1 << 16
"""(Gaussian, pixel) pairs that are computed at once: a few tensors of this size fit into a core's cache."""

_LONGEST = 512
"""Gaussians of one tile that are composited at once."""

_NOTHING = -20.0
"""The logarithm of an alpha that counts as 0: the exponential is slow where it underflows."""


class Scratch:
    """Memory that is used again for each chunk: fresh memory costs as much as what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[int, Tensor] = {}

    def __call__(self, number: int, shape: Sequence[int]) -> Tensor:
        """Returns a piece of memory with any content, by its number."""
        size = math.prod(shape)
        if number not in self._flat or len(self._flat[number]) < size:
            self._flat[number] = self._like.new_empty(size)
        return self._flat[number][:size].view(*shape)


def inverses(covariances: Tensor) -> Tensor:
    """Returns the inverses of covariances that hold the blur: xx, xy and yy, `[..., 3]`."""
    xx, xy, yy = covariances.unbind(-1)
    # The determinant is at least this, whatever is lost to rounding: that without the blur is not negative.
    least = BLUR * (xx + yy) - BLUR * BLUR
    determinant = torch.maximum(xx * yy - xy * xy, least)
    return torch.stack([yy, -xy, xx], dim=-1) / determinant[..., None]


def gaussian_rows(
    means2d: Tensor, covariances: Tensor, opacities: Tensor, features: Tensor
) -> Tensor:
    """Returns for each Gaussian its centre, inverse covariance, logarithm of the opacity and features.

    Args:
        means2d: Centres, pixels. [views, count, 2]
        covariances: xx, xy and yy, with the blur. [views, count, 3]
        opacities: Opacities. [views, count]
        features: What is composited. [views, count, channels]

    Returns:
        One row for each view and Gaussian. [views * count, 6 + channels]
    """
    parts = [means2d, inverses(covariances), opacities[..., None].log(), features]
    return torch.cat(parts, dim=-1).flatten(0, 1)


class Table:
    """The Gaussians of listed tiles, as the coefficients of the logarithm of their alpha in their tile.

    Attributes:
        rows: Gaussians as rows of [views * count], tile after tile. [pairs]
        values: Coefficients of 1, x, y, xx, xy and yy from the centre of the tile, then the features; the last row is
            that of a Gaussian that covers nothing. [pairs + 1, 6 + channels]
        monomials: 1, x, y, xx, xy and yy of a tile's pixels. [pixels, 6]
    """

    def __init__(self, grid: Grid, gaussians: Tensor, lists: TileLists) -> None:
        self.rows, tiles, self._counts = lists
        self.monomials = grid.monomials(gaussians)
        each = gaussians.index_select(0, self.rows)  # [pairs, 6 + channels]
        self._centres = each[:, :2] - grid.centres(gaussians).index_select(0, tiles)
        x, y = self._centres.unbind(-1)
        xx, xy, yy, log_opacity = each[:, 2:6].unbind(-1)
        slope_x, slope_y = xx * x + xy * y, xy * x + yy * y
        constant = log_opacity - 0.5 * (slope_x * x + slope_y * y)
        self.values = each.new_zeros(len(each) + 1, each.shape[1])
        self.values[-1, 0] = _NOTHING
        found = [constant, slope_x, slope_y, -0.5 * xx, -xy, -0.5 * yy]
        torch.stack(found, dim=-1, out=self.values[:-1, :6])
        self.values[:-1, 6:] = each[:, 6:]

    def chunks(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields tiles with lists of similar lengths, and the lists as rows of `values`, cut into blocks.

        Yields:
            The tiles [tiles], and blocks [tiles, length] from front to back, padded with the last row of `values`.
        """
        counts, order = self._counts.sort(descending=True, stable=True)
        starts = (self._counts.cumsum(0) - self._counts)[order]
        lengths = [length for length in counts.tolist() if length]
        at, pixels = 0, len(self.monomials)
        while at < len(lengths):
            longest = lengths[at]
            until = at + max(1, _ELEMENTS // (pixels * min(longest, _LONGEST)))
            until = min(until, len(lengths))  # the others may be another band's
            places = torch.arange(longest, device=counts.device)
            index = starts[at:until, None] + places
            index.masked_fill_(places >= counts[at:until, None], len(self.rows))
            yield order[at:until], list(index.split(_LONGEST, dim=1))
            at = until

    def block(self, index: Tensor) -> Tensor:
        """Returns rows of `values`: `[tiles, length, 6 + channels]`."""
        return self.values.index_select(0, index.reshape(-1)).view(*index.shape, -1)

    def alphas(self, block: Tensor, scratch: Scratch) -> Tensor:
        """Returns what Gaussians cover of their tiles' pixels, 0 if it is too little to count.

        Args:
            block: Rows of `values`. [tiles, length, 6 + channels]
            scratch: Memory for the result, number 0.

        Returns:
            Alphas. [tiles, pixels, length]
        """
        shape = (len(block), len(self.monomials), block.shape[1])
        monomials = self.monomials.expand(len(block), -1, -1)
        alphas = torch.bmm(monomials, block[..., :6].mT, out=scratch(0, shape))
        alphas.clamp_min_(_NOTHING).exp_()
        return torch.threshold_(alphas, LEAST_ALPHA, 0.0).clamp_max_(MOST_ALPHA)

    def about_centres(self, moments: Tensor) -> Tensor:
        """Returns moments about the Gaussians' own centres in place of those about the centres of the tiles.

        Args:
            moments: Sums over pixels of the gradient of the logarithm of alpha times 1, x, y, xx, xy and yy; other
                columns stay. [pairs, 6 + channels]
        """
        x, y = self._centres.unbind(-1)
        one, by_x, by_y, xx, xy, yy = moments[:, :6].unbind(-1)
        off_x, off_y = by_x - x * one, by_y - y * one
        own = [
            one,
            off_x,
            off_y,
            xx - x * (by_x + off_x),
            xy - x * by_y - y * off_x,
            yy - y * (by_y + off_y),
        ]
        return torch.cat([torch.stack(own, dim=-1), moments[:, 6:]], dim=-1)


def gaussian_gradients(
    moments: Tensor, covariances: Tensor, opacities: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of centres, covariances, opacities and features.

    With d the way from the centre to a pixel and Q the inverse covariance, the logarithm of alpha is
    log(opacity) - d Q d / 2; its gradient is Q d for the centre and Q d d Q / 2 for the covariance.

    Args:
        moments: Summed over all tiles, as `Table.about_centres` returns them. [views, count, 6 + channels]
        covariances: xx, xy and yy, with the blur. [views, count, 3]
        opacities: Opacities. [views, count]
    """
    one, off_x, off_y, xx, xy, yy = moments[..., :6].unbind(-1)
    a, b, c = inverses(covariances).unbind(-1)
    centres = torch.stack([a * off_x + b * off_y, b * off_x + c * off_y], dim=-1)
    half_xx, half_xy = a * xx + b * xy, a * xy + b * yy
    half_yx, half_yy = b * xx + c * xy, b * xy + c * yy
    spread = [
        0.5 * (half_xx * a + half_xy * b),
        half_xx * b + half_xy * c,
        0.5 * (half_yx * b + half_yy * c),
    ]
    return (
        centres,
        torch.stack(spread, dim=-1),
        one / opacities.clamp_min(LEAST_ALPHA),
        moments[..., 6:].contiguous(),
    )
