"""The real scene of Gaussians, its rasterizer and its strategy on several processes.

At tolerance 0 each step is bitwise the sequential run's: losses, parameters, statistics and optimizer states.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.methods import Stage
from picardopt_3d.methods.dreamgaussian import DreamGaussianConfig
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import Gaussians
from picardopt_3d.scenes.gaussians import scene as scene_module
from picardopt_3d.scenes.gaussians import strategy
from torch.utils import _pytree as pytree

from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.recipes import (
    CHANGING,
    FEW,
    ahead,
    build,
    sequential,
    tiny,
    wrapped,
)

STEPS = 12
STRATEGY = replace(CHANGING, start=4, stop=12, every=4, gradient=0.5, split_scale=0.2)
"""Changes Gaussians after steps 3 and 7 and resets opacities after steps 4 and 9, so that windows run between."""
STILL = 1e-50
"""A rate that moves no float32 parameter: every guess is right, and windows are accepted up to the next change."""


def config(still: bool = False, across: bool = False) -> DreamGaussianConfig:
    """Gaussians that move, or do not."""
    made = tiny("text-to-3d", "dreamgaussian", {"zero123": Path("of no use here")})
    assert isinstance(made, DreamGaussianConfig)
    scene = replace(FEW, count=24, strategy=STRATEGY, across=across)
    rates = dict.fromkeys(made.rates, STILL) if still else made.rates
    return replace(made, steps=STEPS, scene=scene, rates=rates)


def stage_of(config: DreamGaussianConfig) -> Stage:
    """Gaussians of different sizes and opacities, some of which are too transparent."""
    stage, draws = build(config), torch.Generator().manual_seed(1)
    assert isinstance(stage.scene, Gaussians)
    with torch.no_grad():
        for parameter in stage.scene.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=draws))
    return stage


def state_of(stage: Stage) -> Any:
    """A copy of everything that is compared."""
    (base,) = stage.optimizers()
    return copy.deepcopy((dict(stage.scene.state_dict()), base.state_dict()))


def traced(stage: Stage, steps: Iterable[Losses]) -> list[Any]:
    """Losses with their terms and measurements, and the state, after each step."""
    return [
        (pytree.tree_map(lambda value: value.detach().clone(), losses), state_of(stage))
        for losses in steps
    ]


@functools.cache
def expected(still: bool = False) -> tuple[list[Any], Counter[str]]:
    """The sequential run, and how often what happened."""
    happened: Counter[str] = Counter()
    stage = stage_of(config(still))

    def apply(*given: Any) -> torch.Tensor:
        before = given[0]["log_scales"].detach()
        parents = strategy.apply(*given)
        children = parents.bincount(minlength=len(before))
        halves = int((given[0]["log_scales"] != before[parents]).any(1).sum())
        happened["removed"] += int((children == 0).sum())
        happened["halves"] += halves
        happened["duplicates"] += int((children == 2).sum()) - halves // 2
        happened["resets"] += strategy.resets(given[3], given[4])
        return parents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_module, "apply", apply)
        trace = traced(stage, sequential(stage, STEPS, 3))
    return trace, happened


def on_ranks(
    config: DreamGaussianConfig, saved: Any, steps: int, options: dict[str, Any]
) -> tuple[list[Any], Any, list[int]]:
    """Some steps of a new or a saved run; the trace, what can be saved, and the strides."""
    stage = stage_of(config)
    optimizer = wrapped(stage, STEPS, 3, **options)
    if saved is not None:
        stage.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    trace = traced(stage, ahead(stage, optimizer, steps))
    return (
        trace,
        copy.deepcopy((stage.state_dict(), optimizer.state_dict())),
        optimizer.stats.strides,
    )


@pytest.mark.parametrize("still", [False, True])
def test_everything_happens_in_these_runs(still: bool) -> None:
    happened = expected(still)[1]
    assert happened["resets"] == 2
    assert min(happened[kind] for kind in ("removed", "halves", "duplicates")) >= 2


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("still", [False, True])
def test_bitwise_after_every_step(pools: Pools, world_size: int, still: bool) -> None:
    trace, _ = expected(still)
    options = {"window": 4, "tolerance": 0}
    for got, _, strides in pools(world_size).run(on_ranks, config(still), None, STEPS, options):
        assert_same_bits(got, trace)
        assert sum(strides) == STEPS
        assert not still or max(strides) > 1  # what other processes evaluated is used


@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), pytest.param(3, 2, marks=pytest.mark.slow), (2, 3)]
)
@pytest.mark.parametrize("at", [4, 6])
def test_resumes_bitwise_on_another_number_of_processes(
    pools: Pools, before: int, after: int, at: int
) -> None:
    """Right after a change, and in the middle of what the next one counts."""
    trace, _ = expected()
    options = {"window": 4, "tolerance": 0}
    (got, saved, _), *_ = pools(before).run(on_ranks, config(), None, at, options)
    assert_same_bits(got, trace[:at])
    assert len(saved[0]["scene"]["means"]) != len(trace[0][1][0]["means"])
    options = {"window": 3, "tolerance": 0}
    for got, _, _ in pools(after).run(on_ranks, config(), saved, STEPS - at, options):
        assert_same_bits(got, trace[at:])


@pytest.mark.parametrize("tolerance", [1e-3, math.inf])
def test_windows_that_run_across_end_with_the_same_bits_on_all_processes(
    pools: Pools, tolerance: float
) -> None:
    """Those of one process with the same window, too."""
    options = {"window": 8, "tolerance": tolerance}
    alone = on_ranks(config(across=True), None, STEPS, options)
    assert tolerance < math.inf or alone[2] == [8, 4]  # steps 3, 4 and 9 are inside
    assert all(math.isfinite(losses.total) for losses, _ in alone[0])
    for got in pools(2).run(on_ranks, config(across=True), None, STEPS, options):
        assert_same_bits(got[0], alone[0])
        assert got[2] == alone[2]
