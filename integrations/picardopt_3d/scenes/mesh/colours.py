"""Colours in space: a hash encoding and a small network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from picardopt_3d.scenes.hash_grid import HashConfig, HashGrid
from picardopt_3d.scenes.mesh.surfaces import POINTS_AT_ONCE
from picardopt_3d.scenes.nerf import NerfField
from picardopt_3d.scenes.networks import Mlp
from picardopt_3d.scenes.scene import Scene
from picardopt_3d.scenes.sdf import SdfField


class Colours(nn.Module):
    """A colour at every point of a cube.

    Args:
        encoding: Configuration of the hash encoding.
        radius: Half an edge of the cube, world units.
        width: Width of the network's hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(self, encoding: HashConfig, radius: float, width: int, depth: int) -> None:
        super().__init__()
        self.encoding = HashGrid(encoding, radius)
        self.network = Mlp(self.encoding.width, width, depth, 3)

    def forward(self, points: Tensor, step: int | None = None) -> Tensor:
        """Returns the albedo of points; gradients flow to the parameters, not to the points.

        Args:
            points: Points, world units, `[count, 3]`.
            step: Step of the run, for levels that are added progressively; None: all of them.

        Returns:
            RGB in [0, 1], `[3, count]`.
        """
        parts = [points] if torch.is_grad_enabled() else points.split(POINTS_AT_ONCE)
        return torch.cat(
            [torch.sigmoid(self.network(self.encoding(part, step)[0])) for part in parts], 1
        )

    @torch.no_grad()
    def copy_from(self, other: Scene) -> bool:
        """Copies the colours of another scene, if its encoding and network have the same sizes.

        Args:
            other: The other scene; of a field whose network has further outputs, only colours are copied.

        Returns:
            Whether they could be copied; nothing has changed otherwise.
        """
        encoding, network = _sources(other)
        if encoding is None or self.encoding.radius != encoding.radius:
            return False
        if _levels(self.encoding.config) != _levels(encoding.config):
            return False
        shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        if shapes != {name: value.shape for name, value in network.items()}:
            return False
        self.network.load_state_dict(network)
        self.encoding.load_state_dict(encoding.state_dict())
        return True


def _sources(other: Scene) -> tuple[HashGrid | None, dict[str, Tensor]]:
    """Returns the encoding of another scene's colours, and the weights of their network; (None, {}) if it has none."""
    if isinstance(other, NerfField):
        weights = dict(other.network.state_dict())
        last = len(other.network.layers) - 1
        for name in (f"layers.{last}.weight", f"layers.{last}.bias"):
            weights[name] = weights[name][1:]  # the first output is the density
        return other.encoding, weights
    if isinstance(other, SdfField):
        return other.encoding, dict(other.colours.state_dict())
    own = getattr(other, "colours", None)
    if isinstance(own, Colours):
        return own.encoding, dict(own.network.state_dict())
    return None, {}


def _levels(config: HashConfig) -> HashConfig:
    """Returns a configuration without when its levels are added."""
    return replace(config, start_level=None, after=0, every=1)
