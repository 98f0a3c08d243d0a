"""Small scenes guided by the model that ships or by the closed-form score, and how far apart two of them are."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance import ExactScore, ScoreDistillation, SdsConfig
from picardopt_3d.guidance.choose import load_score
from picardopt_3d.guidance.exact_score import Candidates, ViewSet
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.scenes import Scene
from picardopt_3d.world.yardstick import held_out_cameras

SCALES = {"exact": 7.5, "diffusion": SMALL.sds.guidance_scale}
"""Classifier-free guidance; the shipped pipeline's own for the model that ships."""


class Remembered:
    """A set of views that renders for each batch of cameras once: every trial sees the same ones.

    Args:
        views: the set to ask.
    """

    def __init__(self, views: ViewSet) -> None:
        self.views, self.captions, self.size = views, views.captions, views.size
        self.seen: dict[bytes, Candidates] = {}

    def candidates(self, cameras: Cameras) -> Candidates:
        """What the set answered the first time. All that a view depends on is in the key."""
        key = cameras.camera_to_world.numpy().tobytes() + cameras.fov.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.views.candidates(cameras)
        return self.seen[key]


@cache
def guidance_of(name: str, prompt: str) -> ScoreDistillation:
    """One score model a process."""
    model = "exact" if name == "exact" else "pixel-diffusion"
    score = load_score(replace(SMALL.guidance, model=model), prompt, 32, "cpu")
    guidance = ScoreDistillation(score, SdsConfig(guidance_scale=SCALES[name]))
    if isinstance(guidance.score, ExactScore):
        guidance.score.view_set = Remembered(guidance.score.view_set)
    return guidance


def distances(one: Scene, other: Scene, size: int) -> dict[str, float]:
    """Root mean square difference of the parameters and of the held-out views."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    squared = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
    cameras = held_out_cameras()
    with torch.no_grad():
        apart = (one.render(cameras, size).rgb - other.render(cameras, size).rgb).square().mean()
    numel = sum(p.numel() for p in one.parameters())
    return {"parameters": math.sqrt(squared / numel), "pictures": float(apart.sqrt())}
