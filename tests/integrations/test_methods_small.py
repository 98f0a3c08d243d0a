"""The small presets, whole: with what ships they make the object that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from picardopt_3d.methods import METHODS
from picardopt_3d.world.yardstick import psnr_against_truth

from tests.integrations.helpers.recipes import CHAIR, build, count_of, sequential


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or so on a core of its own
@pytest.mark.parametrize(
    ("command", "method", "preset", "least"),
    [
        ("text-to-3d", "dreamfusion", "small-nerf", 20.0),
        ("text-to-3d", "textmesh", "small", 21.0),
        ("text-to-3d", "dreamgaussian", "small", 24.0),
        ("image-to-3d", "zero123", "small", 19.0),
        ("image-to-3d", "zero123-gaussians", "small", 21.5),
        ("image-to-3d", "dreamgaussian", "small", 22.5),
    ],
)
def test_a_small_preset_shows_the_chair(
    command: str, method: str, preset: str, least: float
) -> None:
    """Far above the 14 dB or so of the scene that a run begins with."""
    config: Any = METHODS[command][method].presets[preset]
    stage = build(config, picture=512)
    before, counts = psnr_against_truth(stage.scene, CHAIR, config.final_pixels), set()
    for _ in sequential(stage, config.steps, 0):
        counts.add(count_of(stage))
    found = psnr_against_truth(stage.scene, CHAIR, config.final_pixels)
    assert found > least
    assert found > before + 3
    if stage.restructure() is None:
        assert stage.scene.occupancy is not None
        assert stage.scene.occupancy.occupied().float().mean() < 0.6  # empty space is left out
    else:
        assert len(counts) > 1  # Gaussians came and went
