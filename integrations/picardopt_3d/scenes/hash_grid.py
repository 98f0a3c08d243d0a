"""A multiresolution hash encoding (Instant-NGP, arXiv 2201.05989, section 3), fast on one CPU thread.

Every level is a grid whose vertices carry a few features, interpolated trilinearly. If a level has more vertices than
its table has entries, a hash makes vertices share entries. The encoding also returns the derivatives of the features in
closed form, so that a normal costs one look-up and needs no second differentiation in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PRIMES = (1, 2_654_435_761, 805_459_861)  # Instant-NGP's spatial hash, equation 4
_FRESH = 1e-4  # initial features are uniform in [-_FRESH, _FRESH]


@dataclass(frozen=True)
class HashConfig:
    """Configuration of a `HashGrid`.

    Attributes:
        levels: Number of resolutions.
        features: Numbers per vertex of each level.
        log2_size: Base-2 logarithm of the largest number of entries in a level's table; a level with fewer vertices
            has one entry per vertex.
        base: Cells along an edge of the coarsest level.
        scale: Ratio of the resolutions of consecutive levels.
        start_level: Levels that are active from the first step; None: all of them.
        every: Steps between the activations of two further levels.
        after: Step after which further levels become active.
    """

    levels: int = 16
    features: int = 2
    log2_size: int = 19
    base: int = 16
    scale: float = 1.4473
    start_level: int | None = None
    every: int = 500
    after: int = 2000

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        for name in ("levels", "features", "base", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give a whole number of at least 1"
                )
        if not 1 <= self.log2_size <= 30:
            raise ValueError(f"log2_size={self.log2_size!r}: give 1 to 30 (2^19 entries are usual)")
        if not self.scale >= 1:
            raise ValueError(
                f"scale={self.scale!r}: give 1 or more; levels run from coarse to fine"
            )
        if self.start_level is not None and not 1 <= self.start_level <= self.levels:
            raise ValueError(
                f"start_level={self.start_level!r}: give 1 to levels={self.levels}, or None for all from the start"
            )
        if self.after < 0:
            raise ValueError(f"after={self.after!r}: give 0 or a later step")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Cells along an edge of each level, coarse to fine (Instant-NGP, equation 2)."""
        # Rounding may leave the product just below the intended whole number.
        return tuple(int(self.base * self.scale**level + 1e-6) for level in range(self.levels))


class HashGrid(nn.Module):
    """A hash encoding of points in a cube.

    Args:
        config: The configuration.
        radius: Half an edge of the cube, world units; points outside get the features of the nearest face.

    Attributes:
        table: Entries of all levels, coarse to fine, one row per feature, `[features, entries]`.
    """

    def __init__(self, config: HashConfig, radius: float = 1.0) -> None:
        super().__init__()
        self.config, self.radius = config, radius
        self.levels: list[_Level] = []
        offset = 0
        for cells in config.resolutions:
            size = min((cells + 1) ** 3, 2**config.log2_size)
            self.levels.append(_Level(cells, offset, size, hashed=size < (cells + 1) ** 3))
            offset += size
        self.table = nn.Parameter(torch.empty(config.features, offset).uniform_(-_FRESH, _FRESH))

    @property
    def width(self) -> int:
        """Features per point, over all levels."""
        return self.config.levels * self.config.features

    def bands(self, step: int | None) -> int:
        """Returns how many levels are active at a step; at None (a finished scene) all of them."""
        config = self.config
        if step is None or config.start_level is None:
            return config.levels
        further = max(0, step - config.after) // config.every
        return min(config.levels, config.start_level + further)

    def forward(
        self, points: Tensor, step: int | None = None, slopes: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes points; gradients flow to the table, not to the points.

        Args:
            points: Points, world units, `[count, 3]`.
            step: Step of the run; levels that are not active yet at this step are zeros.
            slopes: Whether to compute the derivatives of the features with respect to the points.

        Returns:
            The features, level by level, `[width, count]`, and their derivatives per world unit, `[3, width, count]`,
            or None. On a face between two cells the derivative is that of the cell above.
        """
        levels = self.levels[: self.bands(step)]
        out: Tensor = _Encode.apply(  # type: ignore[no-untyped-call] # torch's
            self.table, points, levels, self.radius, slopes
        )
        missing = self.width - len(levels) * self.config.features
        if missing:
            out = torch.cat([out, out.new_zeros(len(out), missing, len(points))], 1)
        return out[0], (out[1:] if slopes else None)


@dataclass(frozen=True)
class _Level:
    """The grid of one level.

    Attributes:
        cells: Cells along an edge.
        offset: Index of the level's first entry in the table.
        size: Number of the level's entries.
        hashed: Whether vertices share entries.
    """

    cells: int
    offset: int
    size: int
    hashed: bool

    def corners(self, points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Returns the table entries at the corners of the points' cells, and the points' positions in their cells.

        Args:
            points: Points, world units, one row per coordinate, `[3, count]`.
            radius: Half an edge of the cube, world units.

        Returns:
            Indices of entries, `[2 (x), 2 (y), 2 (z), count]`, and fractions of a cell, `[3, count]`.
        """
        places = (points * (0.5 * self.cells / radius) + 0.5 * self.cells).clamp_(0, self.cells)
        low = places.floor().clamp_max_(self.cells - 1)
        fractions = places - low
        x, y, z = low.long()
        steps = torch.arange(2, device=points.device)[:, None]
        if not self.hashed:
            edge = self.cells + 1
            first = (z * edge + y) * edge + x + self.offset
            offsets = steps[:, None, None] + edge * steps[None, :, None] + edge**2 * steps
            return first + offsets, fractions
        # Equation 4 in 64 bits: the modulo keeps the low bits, which are the same as in 32.
        in_x, in_y, in_z = (
            (row + steps) * prime for row, prime in zip((x, y, z), _PRIMES, strict=True)
        )  # each [2, count]
        entries = in_x[:, None, None] ^ (in_y[:, None] ^ in_z)[None]
        return entries.bitwise_and_(self.size - 1).add_(self.offset), fractions


class _Encode(torch.autograd.Function):
    """Trilinear interpolation of all levels, with a gradient for the table.

    Only the points are kept for the backward pass; the rest is cheap to recompute. On a CPU the sums into the table
    follow the order of the points, so that the same inputs give the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, points: Tensor, levels: list[_Level], radius: float, slopes: bool
    ) -> Tensor:
        """Returns the features, then their derivatives by x, y and z if requested, `[1 or 4, width, count]`."""
        ctx.save_for_backward(points)
        ctx.levels, ctx.radius, ctx.shape = levels, radius, table.shape
        columns, features, count = points.T.contiguous(), len(table), len(points)
        out = table.new_empty(4 if slopes else 1, len(levels), features, count)
        at_corners = table.new_empty(features, 2, 2, 2, count)
        for number, level in enumerate(levels):
            entries, (x, y, z) = level.corners(columns, radius)
            for row, values in zip(table, at_corners, strict=True):
                torch.index_select(row, 0, entries.view(-1), out=values.view(-1))
            along_x = at_corners[:, 1] - at_corners[:, 0]  # [features, 2 (y), 2 (z), count]
            on_x = at_corners[:, 0].addcmul(along_x, x)
            along_y = on_x[:, 1] - on_x[:, 0]  # [features, 2 (z), count]
            on_y = on_x[:, 0].addcmul(along_y, y)
            along_z = on_y[:, 1] - on_y[:, 0]  # [features, count]
            torch.addcmul(on_y[:, 0], along_z, z, out=out[0, number])
            if slopes:
                per_unit = 0.5 * level.cells / radius
                along_x = along_x[:, 0].addcmul(along_x[:, 1] - along_x[:, 0], y)
                along_x = along_x[:, 0].addcmul(along_x[:, 1] - along_x[:, 0], z)
                along_y = along_y[:, 0].addcmul(along_y[:, 1] - along_y[:, 0], z)
                for axis, along in enumerate((along_x, along_y, along_z)):
                    torch.mul(along, per_unit, out=out[1 + axis, number])
        return out.view(len(out), len(levels) * features, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Returns the gradient of the table: the steps of `forward`, transposed and in reverse order."""
        (points,) = ctx.saved_tensors
        features, count = ctx.shape[0], len(points)
        columns = points.T.contiguous()
        grad = grad.reshape(len(grad), len(ctx.levels), features, count)
        table = grad.new_zeros(ctx.shape)
        for number, level in enumerate(ctx.levels):
            entries, (x, y, z) = level.corners(columns, ctx.radius)
            along_x = along_y = along_z = None
            if len(grad) == 4:
                along_x, along_y, along_z = grad[1:, number] * (0.5 * level.cells / ctx.radius)
                along_x, along_y = _spread(along_x, z), _spread(along_y, z)
                along_x = _spread(along_x, y)
            on_y = _spread(grad[0, number], z, along_z)
            on_x = _spread(on_y, y, along_y)
            at_corners = _spread(on_x, x, along_x)
            for row, values in zip(table, at_corners, strict=True):
                row.scatter_add_(0, entries.view(-1), values.view(-1))
        return table, None, None, None, None


def _spread(value: Tensor, fraction: Tensor, slope: Tensor | None = None) -> Tensor:
    """Returns the gradients of both ends of an interpolation low + fraction (high - low).

    Args:
        value: Gradient of the interpolated value, `[features, ..., count]`.
        fraction: Distance from the low end as a fraction, `[count]`.
        slope: Gradient of the slope high - low, `[features, ..., count]`; None: it was not used.

    Returns:
        Gradients of the low and the high end, `[features, 2, ..., count]`.
    """
    ends = value.new_empty(len(value), 2, *value.shape[1:])
    low, high = ends[:, 0], ends[:, 1]
    if slope is None:
        torch.mul(value, fraction, out=high)
    else:
        torch.addcmul(slope, value, fraction, out=high)
    torch.sub(value, high, out=low)
    return ends
