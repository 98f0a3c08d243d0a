"""ProlificDreamer at sizes that a CPU does in seconds: each stage exact and resumable."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picardopt_3d.methods import Stage, stage_seed
from picardopt_3d.problem import Losses
from picardopt_3d.run.loop import closure_of
from picardopt_3d.scenes import Scene
from picardopt_3d.tolerances import FixedTol
from torch import Tensor

from picardopt import ImpureClosureError, ParallelPicardOptimizer, load_checkpoint, save_checkpoint
from tests.helpers.pool import Pools
from tests.integrations.helpers.prolific import (
    CHANGE,
    NAMES,
    PLAIN,
    SEED,
    before,
    bits,
    build,
    same,
    tiny,
    wrapped,
)
from tests.integrations.helpers.recipes import sequential
from tests.integrations.helpers.tiny_pipelines import save_both_predictions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_both_predictions(tmp_path_factory.mktemp("models"))


def early_bits(
    folders: dict[str, Path], name: str, window: int
) -> tuple[list[Tensor], list[Losses], int]:
    """A stage at tolerance 0 with a window: what it ends with, the losses of its steps, its evaluations."""
    config, index, previous = before(tiny(folders), name)
    stage = build(config, index, previous)
    optimizer, closure = wrapped(stage, config, index, window, FixedTol(0.0)), closure_of(stage)
    losses = [optimizer.step(closure) for _ in range(config.steps)]
    return bits(stage), losses, optimizer.stats.drift_evaluations


Expected = Callable[[str], tuple[list[Tensor], list[Losses]]]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Expected:
    """What each stage ends with sequentially, and its losses; run once."""
    return functools.cache(functools.partial(expected_bits, folders))


def expected_bits(folders: dict[str, Path], name: str) -> tuple[list[Tensor], list[Losses]]:
    config, index, previous = before(tiny(folders), name)
    stage = build(config, index, previous)
    begun = bits(stage)
    losses = list(sequential(stage, config.steps, stage_seed(SEED, index)))
    assert not same(bits(stage), begun)
    return bits(stage), losses


@pytest.mark.parametrize("window", [pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_at_tolerance_0_is_bitwise_the_sequential_one(
    name: str, window: int, folders: dict[str, Path], expected: Expected
) -> None:
    """Over changes of batch, size, noise levels and weights; with the LoRA and its optimizer."""
    wanted, losses = expected(name)
    found, early, evaluations = early_bits(folders, name, window)
    assert evaluations > len(losses)  # it did run ahead
    assert same(found, wanted)
    for one, other in zip(early, losses, strict=True):
        assert one.terms.keys() == other.terms.keys()
        assert torch.equal(one.total, other.total)


def job(folders: dict[str, Path], name: str) -> bytes:
    """What one rank ends with, by value."""
    found, _, evaluations = early_bits(folders, name, 3)
    return pickle.dumps(([each.numpy() for each in found], evaluations))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_on_two_processes_is_bitwise_the_sequential_one(
    name: str, folders: dict[str, Path], expected: Expected, pools: Pools
) -> None:
    wanted, losses = expected(name)
    for dumped in pools(2).run(job, folders, name, timeout=280):
        found, evaluations = pickle.loads(dumped)
        assert evaluations > len(losses)
        assert same([torch.as_tensor(each) for each in found], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_resumes_bitwise(
    name: str, folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """In the middle, at the change: scene, carry, LoRA and both optimizers go on, the scene before is not read."""
    wanted, _ = expected(name)
    config, index, previous = before(tiny(folders), name)

    def begun(scene: Scene | None) -> tuple[Stage, ParallelPicardOptimizer]:
        stage = build(config, index, scene)
        return stage, wrapped(stage, config, index, 3, FixedTol(0.0))

    stage, optimizer = begun(previous)
    closure = closure_of(stage)
    for _ in range(CHANGE):
        optimizer.step(closure)
    assert not same(bits(stage), wanted)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, stage.state_dict() | {"optimizer": optimizer.state_dict()})
    state = load_checkpoint(path)
    assert ("lora" in state["guidance"]) == (name != "geometry")
    again, optimizer = begun(previous)
    again.load_state_dict(state)
    optimizer.load_state_dict(state["optimizer"])
    closure = closure_of(again)
    for _ in range(config.steps - CHANGE):
        optimizer.step(closure)
    assert same(bits(again), wanted)


def test_the_papers_lora_is_not_checked_by_evaluating_steps_again(
    folders: dict[str, Path],
) -> None:
    """Its steps would differ: it has learnt in between. It runs ahead all the same."""
    nerf = tiny(folders, 12).nerf
    config = replace(nerf, vsd=replace(nerf.vsd, lora="paper", learning_rate=0.1), picard=PLAIN)
    assert config.caution is not None
    assert nerf.caution is None
    stage = build(config, 0, None)
    assert not stage.repeatable
    assert len(stage.optimizers()) == 1  # the scene's
    optimizer, closure = wrapped(stage, config, 0, 4, None), closure_of(stage)
    for _ in range(config.steps):
        optimizer.step(closure)
    assert optimizer.stats.sweeps < config.steps
    checked = ParallelPicardOptimizer(
        stage.optimizers(), carry=stage.carry(), total_steps=config.steps, window=4
    )
    with pytest.raises(ImpureClosureError):
        for _ in range(config.steps):
            checked.step(closure)
