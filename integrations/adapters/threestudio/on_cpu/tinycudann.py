"""Stands for tiny-cuda-nn: the two encodings that the trial uses, in torch, differentiable twice."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from picardopt_3d.scenes.gaussians.harmonics import harmonic_basis
from torch import Tensor, nn

_PRIMES = (1, 2_654_435_761, 805_459_861)


class Encoding(nn.Module):
    """A multiresolution hash grid, or spherical harmonics of directions.

    Args:
        n_input_dims: 3.
        encoding_config: As tiny-cuda-nn's.
        dtype: Of the result.
    """

    def __init__(
        self, n_input_dims: int, encoding_config: dict[str, Any], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config = encoding_config
        if config["otype"] == "SphericalHarmonics":
            self.n_output_dims = config["degree"] ** 2
            return
        count = config["n_levels"]
        scales = [config["per_level_scale"] ** level for level in range(count)]
        self.cells = [int(config["base_resolution"] * scale) for scale in scales]
        features, entries = config["n_features_per_level"], 2 ** config["log2_hashmap_size"]
        self.n_output_dims = count * features
        self.tables = nn.Parameter(torch.empty(count, entries, features).uniform_(-1e-4, 1e-4))

    def forward(self, points: Tensor) -> Tensor:
        """Returns the features at points in the unit cube. [count, n_output_dims]."""
        if self.config["otype"] == "SphericalHarmonics":
            basis = harmonic_basis(2 * points - 1, self.config["degree"] - 1)
            return torch.cat([torch.ones_like(points[:, :1]), basis], dim=-1)
        found = [
            self._level(table, cells, points)
            for table, cells in zip(self.tables, self.cells, strict=True)
        ]
        return torch.cat(found, dim=-1)

    def _level(self, table: Tensor, cells: int, points: Tensor) -> Tensor:
        low = (points.detach() * cells).floor().clamp(0, cells - 1)
        share = points * cells - low
        total = torch.zeros(len(points), table.shape[1])
        for corner in itertools.product((0, 1), repeat=3):
            offset = torch.tensor(corner)
            x, y, z = ((low.long() + offset) * torch.tensor(_PRIMES)).unbind(-1)
            weight = torch.where(offset.bool(), share, 1 - share).prod(-1, keepdim=True)
            total = total + weight * table[(x ^ y ^ z) % len(table)]
        return total


def free_temporary_memory() -> None:
    """Does nothing."""
