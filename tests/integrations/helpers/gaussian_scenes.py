"""Scenes of a few random Gaussians, and steps of them towards black views."""

from __future__ import annotations

from typing import Any

import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.methods.optim import OptimizerConfig, build_optimizer, gaussian_rates
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import Gaussians, GaussiansConfig, StrategyConfig

EVERY_TWO = StrategyConfig(
    start=1,
    stop=20,
    every=2,
    gradient=0.0,
    split_scale=0.1,
    least_opacity=0.1,
    reset_every=3,
    reset_opacity=0.3,
)
AROUND = orbit_cameras(torch.tensor([0.0, 20.0, -30.0]), torch.tensor([0.0, 120.0, 240.0]))


def scene(seed: int = 0, **options: Any) -> Gaussians:
    """A few random Gaussians of different colours, sizes and opacities."""
    given: dict[str, Any] = {"count": 20, "strategy": EVERY_TWO} | options
    torch.manual_seed(seed)
    made = Gaussians(GaussiansConfig(**given))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.opacity_logits.add_(1.5)
    return made


def optimizer_of(made: Gaussians, **rates: float) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(rates={**gaussian_rates(), **rates}), made.groups())


def take(made: Gaussians, base: torch.optim.Optimizer, step: int, change: Any = None) -> Losses:
    """One step towards black views."""
    base.zero_grad()
    render = made.render(AROUND, 12)
    total = render.rgb.square().mean()
    losses = Losses(total, {}, made.measure(step, render))
    total.backward()
    base.step()
    carry = made.carry()
    assert carry is not None
    assert carry.update is not None
    with torch.no_grad():
        carry.update(losses)
    if change is not None and change.due(step):
        change.function(step)
    return losses


def changed(steps: int = 2) -> tuple[Gaussians, torch.optim.Optimizer]:
    """Gaussians whose number has changed."""
    made = scene()
    base = optimizer_of(made)
    change = made.restructure([base])
    for step in range(steps):
        take(made, base, step, change)
    assert made.count != 20
    return made, base
