"""The recipes on 3D Gaussians run ahead over changes of the Gaussians' number."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import METHODS, Stage
from picardopt_3d.methods.schedules import current
from picardopt_3d.scenes import Gaussians
from picardopt_3d.tolerances import build_tolerance

from tests.integrations.helpers.recipes import (
    FEW,
    ahead,
    build,
    count_of,
    save_pipelines,
    sequential,
    tiny_text,
    wrapped,
)

GAUSSIANS = [
    ("text-to-3d", "dreamgaussian"),
    ("image-to-3d", "dreamgaussian"),
    ("image-to-3d", "zero123-gaussians"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


def same(one: Stage, other: Stage) -> None:
    """Parameters, statistics and optimizer states, bit by bit."""
    for name, value in one.scene.state_dict().items():
        assert torch.equal(value, other.scene.state_dict()[name]), name
    states = [stage.optimizers()[0].state_dict()["state"] for stage in (one, other)]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)


@pytest.mark.parametrize("window", [2, 4, 9])
@pytest.mark.parametrize("across", [False, True])
def test_at_tolerance_0_windows_end_where_gaussians_change(
    across: bool, window: int, folders: dict[str, Path]
) -> None:
    """Over four densifications and an opacity reset, bitwise; `across` is for other tolerances."""
    config = tiny_text(folders, scene=replace(FEW, across=across))
    alone, early = build(config), build(config)
    counts = []
    for _ in sequential(alone, config.steps, 3):
        counts.append(count_of(alone))
    assert len(set(counts)) > 2
    optimizer = wrapped(early, config.steps, 3, window=window, tolerance=0)
    found = []
    for _ in ahead(early, optimizer, config.steps):
        found.append(count_of(early))
    assert found == counts
    same(alone, early)


@pytest.mark.parametrize("across", [False, True])
def test_with_a_tolerance_windows_pass_densifications(
    across: bool, folders: dict[str, Path]
) -> None:
    """With one so large that every sweep is accepted whole, so that across, drifts of other Gaussians are used.

    What was measured of them counts for their successors: two views a step, later three; nothing in the last step,
    which no change follows.
    """
    config = tiny_text(folders, scene=replace(FEW, across=across))
    stage = build(config)
    optimizer = wrapped(stage, config.steps, 3, window=9, tolerance=1e9)
    views = []
    for losses in ahead(stage, optimizer, config.steps):
        assert losses.total.isfinite()
        assert isinstance(stage.scene, Gaussians)
        views.append(int(stage.scene.statistics.views.max()))
    assert optimizer.stats.sweeps == (1 if across else 6)
    assert count_of(stage) != FEW.count
    assert views == [2, 0, 2, 0, 3, 0, 3, 0, 0]


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_run_goes_on_from_between_two_densifications(at: int, folders: dict[str, Path]) -> None:
    """Saved after a step with another number of Gaussians, loaded into a new stage with the first number."""
    config = tiny_text(folders)
    alone = build(config)
    for _ in sequential(alone, config.steps, 3):
        pass
    first, second = build(config), build(config, seed=9)
    optimizer = wrapped(first, config.steps, 3, window=4, tolerance=0)
    for _ in ahead(first, optimizer, at):
        pass
    assert count_of(first) != FEW.count
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second.load_state_dict(saved[0])
    again = wrapped(second, config.steps, 3, window=3, tolerance=0)
    again.load_state_dict(saved[1])
    assert again.step_index == at
    for _ in ahead(second, again, config.steps - at):
        pass
    same(alone, second)


def test_an_interrupt_in_the_middle_of_a_densification_loses_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, states and statistics are those of the step before, and the run can go on."""
    config = tiny_text(folders)
    alone, early = build(config), build(config)
    for _ in sequential(alone, config.steps, 3):
        pass
    optimizer = wrapped(early, config.steps, 3, window=4, tolerance=0)
    assert isinstance(early.scene, Gaussians)
    steps = ahead(early, optimizer, 1)
    next(steps)
    before = copy.deepcopy(early.state_dict())
    statistics = type(early.scene.statistics)
    real = statistics.reset

    def interrupted(self: Any, count: int) -> None:
        real(self, count)
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics, "reset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(ahead(early, optimizer, 1))
    monkeypatch.undo()
    assert optimizer.step_index == 1
    after = early.state_dict()
    for name, value in before["scene"].items():
        assert torch.equal(value, after["scene"][name]), name
    for _ in ahead(early, optimizer, config.steps - 1):
        pass
    same(alone, early)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("command", "method"), GAUSSIANS)
def test_published_settings_run_across_a_densification(
    command: str, method: str, folders: dict[str, Path]
) -> None:
    """16 views of 128 pixels, 5000 Gaussians, a window of 7, through random models of the real classes.

    These pull less than trained ones, so that the threshold is lower; the run begins shortly before its first
    densification.
    """
    config: Any = METHODS[command][method].presets["paper"].stages()[0].config
    guidance = replace(
        config.guidance,
        source=str(folders[config.guidance.model]),
        options=ModelOptions(embeddings=None),
    )
    scene = replace(config.scene, strategy=replace(config.scene.strategy, gradient=0.01))
    config = replace(config, guidance=guidance, scene=scene)
    stage, picard = build(config), config.picard
    rule = build_tolerance(picard.tolerance)
    optimizer = wrapped(
        stage, config.steps, 0, window=picard.window, predictor=picard.predictor, tolerance=rule
    )
    optimizer.step_index = 98
    counts = []
    for losses in ahead(stage, optimizer, 9):
        assert losses.total.isfinite()
        counts.append(count_of(stage))
        if optimizer.stats.sweeps == 2:
            break
    assert optimizer.stats.sweeps == 2
    assert counts[0] == 5000
    assert optimizer.step_index >= 100  # the densification is done
    assert counts[-1] not in (0, 5000)
    assert (current(config.batch, 99), current(config.pixels, 99)) == (16, 128)
