"""The small presets, whole: with what ships they make the object that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance import ScoreDistillation
from picardopt_3d.guidance.choose import load_score
from picardopt_3d.methods import METHODS, Context
from picardopt_3d.world import Subject
from picardopt_3d.world.pictures import true_reference
from picardopt_3d.world.yardstick import psnr_against_truth

from picardopt import step_rng

CHAIR = Subject("chair", "red")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or so on a core of its own
@pytest.mark.parametrize(
    ("command", "method", "preset", "least"),
    [
        ("text-to-3d", "dreamfusion", "small-nerf", 20.0),
        ("text-to-3d", "textmesh", "small", 21.0),
        ("image-to-3d", "zero123", "small", 19.0),
    ],
)
def test_a_small_preset_shows_the_chair(
    command: str, method: str, preset: str, least: float
) -> None:
    """Far above the 14 dB or so of the scene that a run begins with."""
    config: Any = METHODS[command][method].presets[preset]
    prompt, image = config.guidance.text_prompt(CHAIR.caption), None
    if command == "image-to-3d":
        image = true_reference(CHAIR, orbit_cameras(20.0, 30.0))
        prompt = image.prompt()
    score = load_score(config.guidance, CHAIR.caption, config.final_pixels, "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guidance = ScoreDistillation(score, config.sds)
        stage = config.build(Context(guidance, prompt, torch.device("cpu"), image))
    (base,), carry = stage.optimizers(), stage.carry()
    assert carry is not None
    assert carry.update is not None
    before = psnr_against_truth(stage.scene, CHAIR, config.final_pixels)
    for step in range(config.steps):
        with step_rng(0, step):
            base.zero_grad(set_to_none=True)
            values = stage.loss(step)
            values.total.backward()
            base.step()
            carry.update(values)
    found = psnr_against_truth(stage.scene, CHAIR, config.final_pixels)
    assert found > least
    assert found > before + 3
    assert stage.scene.occupancy is not None
    assert stage.scene.occupancy.occupied().float().mean() < 0.6  # empty space is left out
