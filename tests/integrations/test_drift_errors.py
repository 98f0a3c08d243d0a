"""How far drifts were off, beside the noise between steps: in record, report, bar, TensorBoard and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import picardopt_3d.run.record as record_module
import pytest
import torch
from picardopt_3d.export.plots import strides_figure
from picardopt_3d.problem import Losses
from picardopt_3d.run.drifts import figures_of, group_names
from picardopt_3d.run.folder import StageFolder
from picardopt_3d.run.loop import train
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.progress import Progress
from picardopt_3d.run.record import Recorder, RunRecord

from picardopt import DriftTolerance, ParallelPicardOptimizer
from tests.integrations.helpers.tiny_runs import options
from tests.integrations.test_record import Rows


class Groups(Rows):
    """Two measured groups: the drift of one is always the same, that of the other its distance from a moving point.

    Before them are another optimizer's parameters, which are not measured, and a group of none.
    """

    def __init__(self) -> None:
        super().__init__(named=False)
        self.other, self.flat, self.curved = (
            torch.nn.Parameter(torch.ones(size)) for size in (5, 3, 2)
        )
        self.own = torch.optim.SGD(
            [
                {"params": [torch.nn.Parameter(torch.ones(0))], "name": "none"},
                {"params": [self.flat], "name": "flat"},
                {"params": [self.curved], "name": "curved"},
            ],
            0.5,
        )
        self.all: list[torch.optim.Optimizer] = [torch.optim.SGD([self.other], 0.1), self.own]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.all

    def measured(self) -> list[torch.optim.Optimizer]:
        return [self.own]

    def loss(self, step: int) -> Losses:
        distance = self.curved - 3 * math.sin(step)
        total = self.flat.sum() + distance.square().sum() / 2 + self.other.square().sum()
        return Losses(total, {}, {})


def recorder_of(record: RunRecord, steps: int, **given: Any) -> Recorder:
    """A recorder of some steps that are still to be taken."""
    problem = Groups()
    usual = {"window": 3, "tolerance": DriftTolerance(), "secants": 0, "audit": "never"}
    optimizer = ParallelPicardOptimizer(
        problem.all, measured=[problem.own], total_steps=record.step + steps, **usual | given
    )
    optimizer.step_index = record.step
    return Recorder(record, problem, optimizer, 0.0)


def take(record: RunRecord, steps: int, **given: Any) -> Recorder:
    """Takes steps, recorded as a stage's are."""
    recorder, end = recorder_of(record, steps, **given), record.step + steps
    train(recorder.problem, recorder.optimizer, recorder, end, lambda *_: None, lambda: None)
    return recorder


def measured(record: RunRecord, name: str) -> list[list[float]]:
    """The entries with a drift error."""
    return [entry for entry in record.drifts[name] if math.isfinite(entry[0])]


# -- record and report -----------------------------------------------------------------------------------


def test_each_group_has_its_own_error_and_noise() -> None:
    record = RunRecord()
    stats = take(record, 30).stats
    assert list(record.drifts) == ["flat", "curved"]
    assert all(len(entries) == len(record.strides) for entries in record.drifts.values())
    pairs = [
        sweep.measures.pair for sweep in stats.records if sweep.measures and sweep.measures.pair
    ]
    assert len(pairs) > 2
    assert [entry[0] for entry in measured(record, "flat")] == [0.0] * len(pairs)
    # The drift is the distance from a point, and changes as much as the parameters do.
    distances = [pair.distances[1] for pair in pairs]
    assert [entry[0] for entry in measured(record, "curved")] == pytest.approx(distances)
    assert min(distances) > 0
    figures = figures_of(record.drifts)
    assert figures["drift_error"]["flat"] == figures["drift_noise"]["flat"] == 0
    assert figures["drift_error"]["curved"] > 0.01
    assert figures["drift_noise"]["curved"] > 0.1
    assert [entry[2] for entry in record.drifts["flat"]] == pytest.approx([1.0] * stats.sweeps)


def test_the_figures_are_root_mean_squares_of_the_sweeps_that_measured_both() -> None:
    unknown = [math.nan] * 3
    drifts = {"a": [unknown, [9.0, 1.0, 25.0], [math.nan, 3.0, 75.0]], "b": [unknown] * 3}
    figures = figures_of(drifts)
    assert figures == {"drift_error": {"a": 0.6}, "drift_noise": {"a": 0.2}}
    assert figures_of({}) == {}


def test_groups_without_a_name_of_their_own_are_told_apart() -> None:
    tensors = [torch.nn.Parameter(torch.ones(size)) for size in (1, 0, 1, 1)]
    groups = [{"params": [each], "name": "same"} for each in tensors[:3]]
    bases = [torch.optim.SGD(groups, 0.1), torch.optim.SGD([tensors[3]], 0.1)]
    assert group_names(bases) == ["same", "same (1)", "group 2"]


@pytest.mark.parametrize("given", [{"window": 1}, {"tolerance": 0.0}])
def test_what_runs_not_ahead_or_is_exact_records_none(given: dict[str, Any]) -> None:
    record = RunRecord()
    take(record, 8, **given)
    assert record.drifts == {}


def test_a_resumed_run_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record = StageFolder(tmp_path), RunRecord()
    take(record, 12)
    first = json.dumps(record.drifts)
    record.save(folder)
    record = RunRecord.load(folder)
    assert json.dumps(record.drifts) == first  # with the NaNs
    sweeps = len(record.strides)
    take(record, 12)
    assert json.dumps({name: each[:sweeps] for name, each in record.drifts.items()}) == first
    assert all(len(entries) == len(record.strides) for entries in record.drifts.values())
    assert any(math.isfinite(entry[0]) for entry in record.drifts["curved"][sweeps:])
    monkeypatch.setattr(record_module, "HISTORY", 5)
    take(record, 12)
    assert [len(record.drifts[name]) for name in ("flat", "curved")] == [5, 5]


def test_records_of_before_drifts_were_measured_are_gone_on_with(tmp_path: Path) -> None:
    folder, record = StageFolder(tmp_path), RunRecord()
    take(record, 12)
    record.save(folder)
    old = json.loads(folder.record.read_text())
    del old["drifts"]
    folder.record.write_text(json.dumps(old))
    record = RunRecord.load(folder)
    assert record.drifts == {}
    sweeps = len(record.strides)
    take(record, 12)
    assert len(record.drifts["curved"]) == len(record.strides) > sweeps
    assert not any(math.isfinite(x) for entry in record.drifts["curved"][:sweeps] for x in entry)


def test_stages_have_groups_of_their_own() -> None:
    first, last = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    records = [
        RunRecord(strides=[1], drifts={"a": [first], "b": [first]}),
        RunRecord(strides=[1, 1]),
        RunRecord(strides=[1], drifts={"b": [last], "c": [last]}),
    ]
    whole = RunRecord.of_stages(records).drifts
    none = [math.nan] * 3
    expected = {
        "a": [first, none, none, none],
        "b": [first, none, none, last],
        "c": [none, none, none, last],
    }
    assert json.dumps(whole) == json.dumps(expected)


def test_the_report_names_the_scenes_groups(tmp_path: Path) -> None:
    report = run(options(tmp_path, window=4, tolerance="drift"))
    written = json.loads((tmp_path / "report.json").read_text())
    for kind in ("drift_error", "drift_noise"):
        assert report[kind].keys() == {"encoding"}
        assert 0 < report[kind]["encoding"] < 10
        assert written[kind] == report[kind]


# -- while it runs ---------------------------------------------------------------------------------------


def bar_of(recorder: Recorder, steps: int, tensorboard: Path | None = None) -> list[str]:
    """Takes steps and shows them; returns what stood beside the bar after each."""
    shown: list[str] = []
    with Progress(recorder, "rows", steps, 0, lambda step: Path(), tensorboard) as progress:

        def view(step: int, losses: Losses) -> None:
            progress.step(step, losses)
            shown.append(str(progress.bar.postfix))

        train(recorder.problem, recorder.optimizer, recorder, steps, view, lambda: None)
    return shown


def test_the_bar_shows_the_largest_error_once_it_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder = recorder_of(RunRecord(), 30)
    shown = bar_of(recorder, 30)
    largest = recorder.stats.drift_error[1]
    assert largest > recorder.stats.drift_error[0] == 0
    assert shown[-1].endswith(f"drift error={largest:.0%}")
    assert shown[-1] in capsys.readouterr().err.split("\r")[-1]
    first_pair = next(
        sweep.step
        for sweep in recorder.stats.records
        if sweep.measures is not None and sweep.measures.pair is not None
    )
    assert ["drift error=" in each for each in shown] == [step >= first_pair for step in range(30)]


@pytest.mark.parametrize("given", [{"window": 1}, {"tolerance": 0.0}])
def test_a_bar_of_exact_steps_has_no_error(given: dict[str, Any]) -> None:
    shown = bar_of(recorder_of(RunRecord(), 8, **given), 8)
    assert not any("drift error" in each for each in shown)


def test_a_tiny_error_is_not_shown_as_none() -> None:
    recorder = recorder_of(RunRecord(), 30)
    recorder.problem.curved.requires_grad_(False)  # type: ignore[attr-defined]
    assert bar_of(recorder, 30)[-1].endswith("drift error=<1%")


def test_tensorboard_has_errors_and_noise_by_group(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = recorder_of(RunRecord(), 30)
    bar_of(recorder, 30, tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    stats = recorder.stats
    for kind, shares in (("error", stats.drift_error), ("noise", stats.drift_noise)):
        for name, share in zip(("flat", "curved"), shares, strict=True):
            assert events.Scalars(f"drift_{kind}/{name}")[-1].value == pytest.approx(share)


# -- the plot --------------------------------------------------------------------------------------------


def plotted(record: RunRecord) -> tuple[Any, dict[tuple[str, str], list[tuple[int, float]]]]:
    """The panel of drifts, and the points of its lines by color and style."""
    figure = strides_figure(record, 2)
    figure.draw_without_rendering()
    panel = figure.axes[2]
    lines = {
        (str(line.get_color()), str(line.get_linestyle())): list(
            zip(*(each.tolist() for each in line.get_data()), strict=True)
        )
        for line in panel.lines
        if len(line.get_xdata())
    }
    return panel, lines


def test_the_plot_has_a_panel_of_running_means_by_group() -> None:
    nan = math.nan
    record = RunRecord(step=8, sweeps=5, strides=[2] * 3)  # the first two sweeps are not kept
    record.drifts = {
        "a": [[nan, 1.0, 4.0], [9.0, nan, 25.0], [4.0, 4.0, 100.0]],
        "b": [[nan] * 3, [0.0, 0.0, 0.0], [nan, 1.0, 1.0]],
    }
    record.counts = {"rows": [[0, 0, 5]]}
    panel, lines = plotted(record)
    assert lines["C0", "-"] == [
        (3, pytest.approx(3 / 5)),
        (4, pytest.approx(math.sqrt((0.9 * 9 + 4) / (0.9 * 25 + 100)))),
    ]
    assert lines["C0", ":"] == [
        (2, pytest.approx(1 / 2)),
        (4, pytest.approx(math.sqrt((0.9 * 1 + 4) / (0.9 * 4 + 100)))),
    ]
    assert lines["C1", ":"] == [(4, 1.0)]
    assert ("C1", "-") not in lines  # an error of 0 has no place on a logarithmic axis
    texts = [text.get_text() for text in panel.get_legend().get_texts()]
    assert texts == ["a", "drift error", "noise between steps"]
    assert len(strides_figure(record, 2).axes) == 4
    assert len(strides_figure(RunRecord(step=2, sweeps=1, strides=[2]), 2).axes) == 2


@pytest.mark.parametrize(
    "entries", [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]], [[math.nan, math.nan, 1.0]]]
)
def test_a_panel_without_a_point_is_drawn(entries: list[list[float]]) -> None:
    _, lines = plotted(RunRecord(step=2, sweeps=1, strides=[2], drifts={"a": entries}))
    assert lines == {}


@pytest.mark.parametrize(
    ("tolerances", "shown"),
    [
        ([[math.inf, math.nan], [1e-7, math.inf]], [(1, 1e-7)]),
        ([[math.inf] * 2] * 2, []),
        ([[math.nan, 0.0]] * 2, []),
        ([[1e300, 1e-7], [1e-6, 1.7e308]], [(0, 1e-7), (1, 1e-6)]),
    ],
)
def test_tolerances_without_bound_leave_the_others_where_they_are(
    tolerances: list[list[float]], shown: Sequence[tuple[int, float]]
) -> None:
    record = RunRecord(step=4, sweeps=2, strides=[2, 2], tolerances=tolerances)
    record.residuals = [[1e-8, 1e-9], [2e-8, math.inf]]
    figure = strides_figure(record, 2)
    figure.draw_without_rendering()
    panel = figure.axes[1]
    found = {each.get_label(): each.get_offsets().tolist() for each in panel.collections}
    assert [tuple(point) for point in found.pop("tolerance", [])] == shown
    assert [len(points) for points in found.values()] == [3]
    low, high = panel.get_ylim()
    assert 1e-12 < low < high < 1
