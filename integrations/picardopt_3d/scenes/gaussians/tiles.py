"""Alpha compositing of projected Gaussians in tiles, in plain torch (arXiv 2308.04079, section 6).

A picture is cut into square tiles. For each tile the Gaussians that can reach it are listed from front to back; tiles
with lists of similar lengths are composited together, a bounded number of (Gaussian, pixel) pairs at a time. The
backward pass computes these pairs again: between the passes nothing of the size Gaussians x pixels is kept.

On a CPU the same input gives the same bits. With other views in the batch lists are padded to other lengths, which
changes the order of sums: a view's picture is then the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.scenes.gaussians.projection import BLUR, LEAST_ALPHA, Projected
from picardopt_3d.scenes.gaussians.tile_lists import PIXELS, Grid, TileLists, list_tiles

MOST_ALPHA = 0.999
"""What a Gaussian covers of a pixel at most."""

LEAST_TRANSMITTANCE = 1e-4
"""The Gaussian that would leave less than this of a pixel uncovered, and all behind it, are left out."""

_ELEMENTS = 1 << 16
"""(Gaussian, pixel) pairs that are computed at once: a few tensors of this size fit into a core's cache."""
_LONGEST = 512
"""Gaussians of one tile that are composited at once."""

_NOTHING = -1e4
"""The logarithm of an alpha that is 0."""


def composite(
    projected: Projected, opacities: Tensor, features: Tensor, height: int, width: int
) -> Tensor:
    """Composites projected Gaussians from front to back.

    Args:
        projected: The Gaussians on the screen.
        opacities: Their opacities, 0 to 1. [count]
        features: What is composited, such as colours. [views, count, channels]
        height: Rows of pixels.
        width: Columns of pixels.

    Returns:
        Sums of the features times the Gaussians' weights. [views, channels, height, width]
    """
    means2d, covariances, depths, extents = projected
    pictures: Tensor = _Composite.apply(  # type: ignore[no-untyped-call]
        means2d,
        covariances,
        opacities.expand(len(means2d), -1),
        features,
        depths,
        extents,
        height,
        width,
    )
    return pictures


class _Composite(torch.autograd.Function):
    """The sum over Gaussians i of w_i f_i, w_i = alpha_i prod_{j<i} (1 - alpha_j), with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        covariances: Tensor,
        opacities: Tensor,
        features: Tensor,
        depths: Tensor,
        extents: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        grid = Grid(len(means2d), height, width)
        lists = list_tiles(grid, means2d, depths, extents)
        table = _Table(grid, lists, means2d, covariances, opacities, features)
        pictures = features.new_zeros(grid.count, PIXELS, features.shape[-1])
        for tiles, blocks in table.chunks():
            pictures[tiles] = _forward(table, blocks)
        ctx.save_for_backward(means2d, covariances, opacities, features, pictures, *lists)
        ctx.grid = grid
        return grid.untile(pictures)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        means2d, covariances, opacities, features, pictures, *lists = ctx.saved_tensors
        grid: Grid = ctx.grid
        table = _Table(grid, TileLists(*lists), means2d, covariances, opacities, features)
        gradients = grid.tile(gradient)
        moments = features.new_zeros(len(table.rows) + 1, 6 + features.shape[-1])
        for tiles, blocks in table.chunks():
            _backward(table, blocks, gradients[tiles], pictures[tiles], moments)
        found = _onto_gaussians(table, moments[:-1], means2d, covariances, opacities)
        return *found, None, None, None, None


class _Table:
    """The Gaussians of all lists, as the coefficients of the logarithm of their alpha in their tile.

    Attributes:
        rows: Gaussians as rows of [views * count], tile after tile. [pairs]
        local: Their centres from the centre of the tile, pixels. [pairs, 2]
        values: Coefficients of 1, x, y, xx, xy and yy from the centre of the tile, then the features; the last row is
            that of a Gaussian that covers nothing. [pairs + 1, 6 + channels]
    """

    def __init__(
        self,
        grid: Grid,
        lists: TileLists,
        means2d: Tensor,
        covariances: Tensor,
        opacities: Tensor,
        features: Tensor,
    ) -> None:
        self.rows, self.tiles, self.counts = lists
        self.monomials = grid.monomials(features)  # [PIXELS, 6]
        channels = features.shape[-1]
        each = torch.cat(
            [
                means2d.reshape(-1, 2),
                inverses(covariances).reshape(-1, 3),
                opacities.reshape(-1, 1).log(),
                features.reshape(-1, channels),
            ],
            dim=-1,
        )
        each = each.index_select(0, self.rows)  # [pairs, 6 + channels]
        self.local = each[:, :2] - grid.centres(features).index_select(0, self.tiles)
        x, y = self.local.unbind(-1)
        xx, xy, yy, log_opacity = each[:, 2:6].unbind(-1)
        slope_x, slope_y = xx * x + xy * y, xy * x + yy * y
        constant = log_opacity - 0.5 * (slope_x * x + slope_y * y)
        self.values = features.new_zeros(len(each) + 1, 6 + channels)
        self.values[-1, 0] = _NOTHING
        found = [constant, slope_x, slope_y, -0.5 * xx, -xy, -0.5 * yy]
        torch.stack(found, dim=-1, out=self.values[:-1, :6])
        self.values[:-1, 6:] = each[:, 6:]

    def chunks(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields tiles with lists of similar lengths, and the lists as rows of `values`, cut into blocks.

        Yields:
            The tiles [tiles], and blocks [tiles, length] from front to back, padded with the last row of `values`.
        """
        counts, order = self.counts.sort(descending=True, stable=True)
        starts = (self.counts.cumsum(0) - self.counts)[order]
        lengths = counts.tolist()
        at = 0
        while at < len(lengths) and lengths[at]:
            longest = lengths[at]
            until = at + max(1, _ELEMENTS // (PIXELS * min(longest, _LONGEST)))
            places = torch.arange(longest, device=counts.device)
            index = starts[at:until, None] + places
            index.masked_fill_(places >= counts[at:until, None], len(self.rows))
            yield order[at:until], list(index.split(_LONGEST, dim=1))
            at = until

    def alphas(self, block: Tensor) -> Tensor:
        """Returns what Gaussians cover of their tiles' pixels.

        Args:
            block: Rows of `values`. [tiles, length, 6 + channels]

        Returns:
            Alphas. [tiles, PIXELS, length]
        """
        alphas = torch.matmul(self.monomials, block[..., :6].mT).exp_()
        return torch.threshold_(alphas, LEAST_ALPHA, 0.0).clamp_max_(MOST_ALPHA)

    def block(self, index: Tensor) -> Tensor:
        """Returns rows of `values`: `[tiles, length, 6 + channels]`."""
        return self.values.index_select(0, index.reshape(-1)).view(*index.shape, -1)


def _weights(alphas: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weights of Gaussians, and what they leave uncovered.

    Args:
        alphas: Their alphas, from front to back. [tiles, PIXELS, length]
        left: What those before them leave uncovered. [tiles, PIXELS, 1]
    """
    passed = alphas.new_empty(*alphas.shape[:2], alphas.shape[2] + 1)
    passed[..., :1] = left
    torch.sub(1, alphas, out=passed[..., 1:])
    torch.cumprod(passed, dim=-1, out=passed)
    weights = alphas * passed[..., :-1]
    left = passed[..., -1:]
    if bool(left.min() <= LEAST_TRANSMITTANCE):
        weights *= passed[..., 1:] > LEAST_TRANSMITTANCE
    return weights, left


def _forward(table: _Table, blocks: list[Tensor]) -> Tensor:
    """Returns the pictures of tiles: `[tiles, PIXELS, channels]`."""
    left = table.values.new_ones(len(blocks[0]), PIXELS, 1)
    picture = table.values.new_zeros(len(blocks[0]), PIXELS, table.values.shape[1] - 6)
    for index in blocks:
        block = table.block(index)
        weights, left = _weights(table.alphas(block), left)
        picture.baddbmm_(weights, block[..., 6:])
        if bool(left.max() <= LEAST_TRANSMITTANCE):
            break
    return picture


def _backward(
    table: _Table, blocks: list[Tensor], gradient: Tensor, picture: Tensor, moments: Tensor
) -> None:
    """Sums the gradients of the logarithms of alpha times the monomials, and those of the features.

    Args:
        table: What is composited.
        blocks: As `_Table.chunks` yields them.
        gradient: Gradient of the tiles' pictures. [tiles, PIXELS, channels]
        picture: The tiles' pictures. [tiles, PIXELS, channels]
        moments: Receives a row for each row of the table. [pairs + 1, 6 + channels]
    """
    left = table.values.new_ones(len(blocks[0]), PIXELS, 1)
    behind = (gradient * picture).sum(
        -1, keepdim=True
    )  # what this and all behind it add to the loss
    for index in blocks:
        block = table.block(index)
        alphas = table.alphas(block)
        weights, left = _weights(alphas, left)
        pull = torch.matmul(gradient, block[..., 6:].mT).mul_(weights)  # w dL/dw
        hidden = behind - pull.cumsum(-1)
        behind = hidden[..., -1:].clone()
        # dL/dlog(alpha) = w dL/dw - alpha / (1 - alpha) * (the same of all behind it)
        ratio = alphas / (1 - alphas)
        stopped = bool(left.min() <= LEAST_TRANSMITTANCE)
        pull.addcmul_(ratio, hidden, value=-1)
        if stopped:
            pull *= weights > 0
        if bool(alphas.amax() >= MOST_ALPHA):
            pull *= alphas < MOST_ALPHA
        found = torch.cat([pull.mT @ table.monomials, weights.mT @ gradient], dim=-1)
        moments.index_copy_(0, index.reshape(-1), found.view(-1, found.shape[-1]))
        if bool(left.max() <= LEAST_TRANSMITTANCE):
            break


def inverses(covariances: Tensor) -> Tensor:
    """Returns the inverses of covariances that hold the blur: xx, xy and yy: `[..., 3]`."""
    xx, xy, yy = covariances.unbind(-1)
    # The determinant is at least this, whatever is lost to rounding: that without the blur is not negative.
    least = BLUR * (xx + yy) - BLUR * BLUR
    determinant = torch.maximum(xx * yy - xy * xy, least)
    return torch.stack([yy, -xy, xx], dim=-1) / determinant[..., None]


def _onto_gaussians(
    table: _Table, moments: Tensor, means2d: Tensor, covariances: Tensor, opacities: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of centres, covariances, opacities and features.

    Args:
        table: What was composited.
        moments: From `_backward`. [pairs, 6 + channels]
        means2d: Shapes the result, as the next two. [views, count, 2]
        covariances: [views, count, 3]
        opacities: [views, count]
    """
    views, count = opacities.shape
    x, y = table.local.unbind(-1)
    zero, one_x, one_y, xx, xy, yy = moments[:, :6].unbind(-1)
    off_x, off_y = one_x - x * zero, one_y - y * zero  # moments about the Gaussian's own centre
    xx = xx - x * (one_x + off_x)
    yy = yy - y * (one_y + off_y)
    xy = xy - x * one_y - y * off_x
    own = torch.stack([zero, off_x, off_y, xx, xy, yy], dim=-1)
    total = moments.new_zeros(views * count, moments.shape[1])
    total.index_add_(0, table.rows, torch.cat([own, moments[:, 6:]], dim=-1))
    total = total.view(views, count, -1)
    zero, off_x, off_y, xx, xy, yy = total[..., :6].unbind(-1)
    a, b, c = inverses(covariances).unbind(-1)
    centres = torch.stack([a * off_x + b * off_y, b * off_x + c * off_y], dim=-1)
    left_xx, left_xy = a * xx + b * xy, a * xy + b * yy
    left_yx, left_yy = b * xx + c * xy, b * xy + c * yy
    spread = torch.stack(
        [
            0.5 * (left_xx * a + left_xy * b),
            left_xx * b + left_xy * c,
            0.5 * (left_yx * b + left_yy * c),
        ],
        dim=-1,
    )
    return centres, spread, zero / opacities.clamp_min(LEAST_ALPHA), total[..., 6:].contiguous()
