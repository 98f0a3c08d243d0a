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
        ("image-to-3d", "zero123", "small", 19.0),
        ("image-to-3d", "zero123-gaussians", "small", 21.5),
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


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or so on a core of its own
@pytest.mark.parametrize(
    ("command", "least", "gain"), [("text-to-3d", 24.0, 2.0), ("image-to-3d", 22.5, 0.0)]
)
def test_dreamgaussians_mesh_is_nearer_to_the_chair_than_its_gaussians(
    command: str, least: float, gain: float
) -> None:
    """At the second stage's number of pixels, and at the first one's and at 64 too."""
    (_, first), (_, second) = METHODS[command]["dreamgaussian"].presets["small"].stages()
    stage = build(first, picture=512)
    counts = set()
    for _ in sequential(stage, first.steps, 0):
        counts.add(count_of(stage))
    assert len(counts) > 1  # Gaussians came and went
    sizes = {first.final_pixels, second.final_pixels, 64}
    before = {size: psnr_against_truth(stage.scene, CHAIR, size) for size in sizes}
    assert before[first.final_pixels] > least
    mesh = build(second, picture=512, previous=stage.scene)
    for _ in sequential(mesh, second.steps, 0):
        pass
    for size in sizes:
        assert psnr_against_truth(mesh.scene, CHAIR, size) > before[size] + gain, size
