"""Alpha compositing of projected Gaussians in tiles, in plain torch (arXiv 2308.04079, section 6).

A picture is cut into square tiles. For each tile the Gaussians that can reach it are listed from front to back; tiles
with lists of similar lengths are composited together, a bounded number of (Gaussian, pixel) pairs at a time. The
backward pass computes these pairs again: between the passes nothing of the size Gaussians x pixels is kept.

On a CPU the same input gives the same bits. With other views in the batch lists are padded to other lengths, which
changes the order of sums: a view's picture is then the same to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picardopt_3d.scenes.gaussians.projection import Projected
from picardopt_3d.scenes.gaussians.tile_lists import (
    Boxes,
    Grid,
    find_boxes,
    list_tiles,
    split_bands,
)
from picardopt_3d.scenes.gaussians.tile_table import (
    MOST_ALPHA,
    Scratch,
    Table,
    gaussian_gradients,
    gaussian_rows,
)

LEAST_TRANSMITTANCE = 1e-4
"""The Gaussian that would leave less than this of a pixel uncovered, and all behind it, are left out."""


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
        boxes = find_boxes(grid, means2d, depths, extents)
        bands = split_bands(grid, boxes)
        gaussians = gaussian_rows(means2d, covariances, opacities, features)
        pictures = features.new_zeros(grid.count, grid.pixels, features.shape[-1])
        scratch = Scratch(features)
        for band in bands:
            table = Table(grid, gaussians, list_tiles(grid, gaussians, boxes, band))
            for tiles, blocks in table.chunks():
                pictures[tiles] = _forward(table, blocks, scratch)
        ctx.save_for_backward(means2d, covariances, opacities, features, pictures, *boxes)
        ctx.grid, ctx.bands = grid, bands
        ctx.table = table if len(bands) == 1 else None
        return grid.join(pictures)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        means2d, covariances, opacities, features, pictures, *boxes = ctx.saved_tensors
        grid: Grid = ctx.grid
        gaussians = gaussian_rows(means2d, covariances, opacities, features)
        gradients = grid.cut(gradient)
        total = torch.zeros_like(gaussians)
        scratch = Scratch(features)
        for band in ctx.bands:
            lists = None if ctx.table else list_tiles(grid, gaussians, Boxes(*boxes), band)
            table = ctx.table if lists is None else Table(grid, gaussians, lists)
            moments = torch.zeros_like(table.values)
            for tiles, blocks in table.chunks():
                _backward(table, blocks, gradients[tiles], pictures[tiles], moments, scratch)
            total.index_add_(0, table.rows, table.about_centres(moments[:-1]))
        total = total.view(*opacities.shape, total.shape[1])
        found = gaussian_gradients(total, covariances, opacities)
        return *found, None, None, None, None


def _weights(alphas: Tensor, left: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, bool]:
    """Returns the weights of Gaussians, what they leave uncovered, and whether some were left out as hidden.

    Args:
        alphas: Their alphas, from front to back. [tiles, pixels, length]
        left: What those before them leave uncovered. [tiles, pixels, 1]
        scratch: Memory for the result and on the way, numbers 1 and 2.
    """
    tiles, pixels, length = alphas.shape
    passed = scratch(1, (tiles, pixels, length + 1))
    passed[..., :1] = left
    torch.sub(1, alphas, out=passed[..., 1:])
    torch.cumprod(passed, dim=-1, out=passed)
    weights = torch.mul(alphas, passed[..., :-1], out=scratch(2, alphas.shape))
    left = passed[..., -1:].clone()
    hidden = bool(left.min() <= LEAST_TRANSMITTANCE)
    if hidden:
        weights *= passed[..., 1:] > LEAST_TRANSMITTANCE
    return weights, left, hidden


def _forward(table: Table, blocks: list[Tensor], scratch: Scratch) -> Tensor:
    """Returns the pictures of tiles: `[tiles, pixels, channels]`."""
    shape = (len(blocks[0]), len(table.monomials))
    left = table.values.new_ones(*shape, 1)
    picture = table.values.new_zeros(*shape, table.values.shape[1] - 6)
    for index in blocks:
        block = table.block(index)
        weights, left, hidden = _weights(table.alphas(block, scratch), left, scratch)
        picture.baddbmm_(weights, block[..., 6:])
        if hidden and bool(left.max() <= LEAST_TRANSMITTANCE):
            break
    return picture


def _backward(
    table: Table,
    blocks: list[Tensor],
    gradient: Tensor,
    picture: Tensor,
    moments: Tensor,
    scratch: Scratch,
) -> None:
    """Sums the gradients of the logarithms of alpha times the monomials, and those of the features.

    Args:
        table: What is composited.
        blocks: As `Table.chunks` yields them.
        gradient: Gradient of the tiles' pictures. [tiles, pixels, channels]
        picture: The tiles' pictures. [tiles, pixels, channels]
        moments: Receives a row for each row of the table. [pairs + 1, 6 + channels]
        scratch: Memory on the way.
    """
    left = table.values.new_ones(*gradient.shape[:2], 1)
    behind = (gradient * picture).sum(
        -1, keepdim=True
    )  # what this and all behind it add to the loss
    for index in blocks:
        block = table.block(index)
        alphas = table.alphas(block, scratch)
        weights, left, hidden = _weights(alphas, left, scratch)
        pull = torch.bmm(gradient, block[..., 6:].mT, out=scratch(3, alphas.shape))
        pull *= weights
        after = torch.cumsum(pull, dim=-1, out=scratch(1, alphas.shape))
        torch.sub(behind, after, out=after)
        behind = after[..., -1:].clone()
        # dL/dlog(alpha) = w dL/dw - alpha / (1 - alpha) * (the sum of w dL/dw over all behind it)
        ratio = torch.sub(1, alphas, out=scratch(4, alphas.shape))
        torch.div(alphas, ratio, out=ratio)
        pull.addcmul_(ratio, after, value=-1)
        if hidden:
            pull *= weights > 0
        if bool(alphas.amax() >= MOST_ALPHA):
            pull *= alphas < MOST_ALPHA
        monomials = table.monomials.expand(len(block), -1, -1)
        found = torch.cat([pull.mT @ monomials, weights.mT @ gradient], dim=-1)
        moments.index_copy_(0, index.reshape(-1), found.view(-1, found.shape[-1]))
        if hidden and bool(left.max() <= LEAST_TRANSMITTANCE):
            break
