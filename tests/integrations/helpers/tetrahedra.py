"""Tetrahedral scenes for the tests."""

from __future__ import annotations

from typing import Any

import torch
from picardopt_3d.scenes import HashConfig, Tetrahedral, TetrahedralConfig

ENCODING = HashConfig(levels=3, log2_size=9, base=4, scale=1.8)


def config(resolution: int = 8, **changes: Any) -> TetrahedralConfig:
    """A small grid before a plain background."""
    given: dict[str, Any] = {
        "resolution": resolution,
        "radius": 0.6,
        "encoding": ENCODING,
        "width": 8,
        "background": "solid",
    }
    return TetrahedralConfig(**given | changes)


def rugged(resolution: int = 8, seed: int = 0, **changes: Any) -> Tetrahedral:
    """A scene that is no longer a sphere, in colours that differ from place to place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scene = Tetrahedral(config(resolution, **changes))
        with torch.no_grad():
            scene.distance.add_(0.5 * torch.randn_like(scene.distance))
            scene.offsets.copy_(torch.randn_like(scene.offsets))
            scene.colours.encoding.table.normal_()
            for parameter in scene.background.parameters():
                parameter.normal_()
    return scene
