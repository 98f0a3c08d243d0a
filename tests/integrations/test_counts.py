"""How many parts a scene has over a run: in the plot, the report, what is printed, the bar and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.command import text_to_3d
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.export.plots import strides_figure
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamgaussian import DreamGaussian
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import GaussiansConfig, StrategyConfig
from picardopt_3d.scenes.field import Field
from safetensors.torch import load_file
from torch.optim import Optimizer

from picardopt import Restructure
from tests.integrations.helpers.stopping import stopped
from tests.integrations.helpers.tiny_runs import TINY_OPTIONS, options


def record_of(strides: list[int], changes: dict[int, int], sweeps: int | None = None) -> RunRecord:
    """A record with a number of Gaussians from steps on, each the last of its sweep."""
    record = RunRecord(step=sum(strides), sweeps=len(strides), strides=strides)
    ends = {sum(strides[:sweep]): sweep for sweep in range(len(strides) + 1)}
    record.counts["Gaussians"] = [[step, ends[step], count] for step, count in changes.items()]
    record.restructured = [[step, ends[step]] for step in changes if step]
    record.strides = strides[len(strides) - (sweeps or len(strides)) :]
    return RunRecord.of_stages([record])


def line_of(record: RunRecord) -> list[tuple[float, float]]:
    """The corners of the line in the third panel."""
    (line,) = strides_figure(record, 4).axes[2].lines
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def marks_of(record: RunRecord) -> list[list[float]]:
    """Where each panel has upright lines."""
    found = []
    for panel in strides_figure(record, 4).axes:
        marks = [each for each in panel.collections if each.get_linestyle() and each.get_segments()]
        found.append([float(ends[0][0]) for each in marks for ends in each.get_segments()])
    return found


CHANGING = record_of([1, 3, 2, 4, 1, 1], {0: 500, 4: 812, 6: 700, 11: 1204})


def test_the_number_is_a_line_over_the_sweeps_and_changes_are_marked_in_all_panels() -> None:
    assert line_of(CHANGING) == [(-0.5, 500), (1.5, 812), (2.5, 700), (4.5, 1204), (5.5, 1204)]
    assert marks_of(CHANGING) == [[1.5, 2.5, 4.5]] * 3
    figure = strides_figure(CHANGING, 4)
    legends = [panel.get_legend() for panel in figure.axes]
    texts = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    assert texts.count("restructured") == texts.count("Gaussians") == 1
    figure.draw_without_rendering()
    assert "1,000" in {text.get_text() for text in figure.axes[2].get_yticklabels()}


def test_what_was_before_the_sweeps_that_are_shown_ends_at_the_edge() -> None:
    record = record_of([1, 3, 2, 4, 1, 1], {0: 500, 4: 812, 6: 700, 11: 1204}, sweeps=3)
    assert line_of(record) == [(2.5, 700), (4.5, 1204), (5.5, 1204)]
    assert marks_of(record) == [[4.5]] * 3
    assert line_of(record_of([2] * 9, {0: 5, 2: 8}, sweeps=4)) == [(4.5, 8), (8.5, 8)]


def test_a_scene_that_counts_nothing_has_two_panels_and_no_marks() -> None:
    record = RunRecord(step=4, sweeps=2, strides=[2, 2])
    assert marks_of(record) == [[], []]


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A field that counts how often it was changed, and is after steps 3 and 7."""
    changed: list[int] = []

    def restructure(self: Field, optimizers: Sequence[Optimizer]) -> Restructure:
        return Restructure(changed.append, lambda step: step in (3, 7))

    monkeypatch.setattr(Field, "restructure", restructure)
    monkeypatch.setattr(Field, "counts", lambda self: {"Gaussians": 1200 + 2 * len(changed)})
    return changed


def test_the_report_has_the_last_number_and_all_before(tmp_path: Path, growing: list[int]) -> None:
    report = run(options(tmp_path, window=3))
    assert growing == [3, 7]
    assert report["gaussians"] == 1204
    assert report["counts"] == {"Gaussians": [[0, 1200], [4, 1202], [8, 1204], [12, 1204]]}
    assert report["restructured"] == [4, 8]
    assert json.loads((tmp_path / "report.json").read_text())["counts"] == report["counts"]


def test_other_reports_are_as_before(tmp_path: Path) -> None:
    report = run(options(tmp_path, window=3))
    assert not {"gaussians", "counts", "restructured"} & report.keys()


def test_the_last_number_is_printed_and_beside_the_bar(
    tmp_path: Path, growing: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["a red cube", "--out", str(tmp_path), "--workers", "1", "--recipe.steps", "9"]
    text_to_3d([*given, *TINY_OPTIONS])
    said, bar = capsys.readouterr()
    assert "by 1 worker(s); 1,204 Gaussians; " in said
    assert "Gaussians=1204" in bar


def test_tensorboard_has_the_number(tmp_path: Path, growing: list[int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(options(tmp_path, window=3, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [event.value for event in events.Scalars("counts/Gaussians")]
    assert seen == [1200.0] * 3 + [1202.0] * 4 + [1204.0] * 5


def gaussians(out: Path, **changes: Any) -> TextTo3DConfig:
    """Gaussians that are added and removed three times in 14 steps, and made transparent once."""
    strategy = StrategyConfig(
        start=3,
        stop=13,
        every=4,
        gradient=0.0,
        least_opacity=0.02,
        reset_every=6,
        reset_opacity=0.05,
        most=30,
    )
    scene = GaussiansConfig(count=20, opacity=0.3, strategy=strategy)
    small = METHODS["text-to-3d"]["dreamgaussian"].presets["small"].stages()[0].config
    exact = GuidanceConfig("exact")
    recipe = replace(small, steps=14, batch=1, pixels=8, scene=scene, guidance=exact)
    return options(out, **({"method": "dreamgaussian", "recipe": recipe} | changes))


@pytest.mark.parametrize("at", [None, 7, 9])
def test_gaussians_have_the_same_history_ahead_and_resumed(tmp_path: Path, at: int | None) -> None:
    found = []
    for name, given in (("one", {"sequential": True}), ("other", {"window": 5, "tolerance": 0.0})):
        config = gaussians(tmp_path / name, **given)
        if at is not None and name == "other":
            with stopped(DreamGaussian, at):
                train(config, time.time())
        record = train(config, time.time(), resume=at is not None and name == "other")
        history = [(steps, count) for steps, _, count in record.counts["Gaussians"]]
        found.append((history, [steps for steps, _ in record.restructured]))
    assert found[0] == found[1]
    history, changes = found[0]
    assert len(history) > 1
    assert set(changes) > {steps for steps, _ in history[1:]}  # opacities are reset too
    one, other = (load_file(RunFolder(tmp_path / name).scene) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
