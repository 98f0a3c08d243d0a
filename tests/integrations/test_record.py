"""The record of a long run: totals count everything, histories are bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import picardopt_3d.run.record as record_module
import pytest
import torch
from picardopt_3d.export.plots import save_strides_plot, strides_figure, title_of
from picardopt_3d.problem import Losses
from picardopt_3d.run.folder import StageFolder
from picardopt_3d.run.loop import train
from picardopt_3d.run.record import Recorder, RunRecord
from PIL import Image

from picardopt import ParallelPicardOptimizer, Restructure


class Rows:
    """A problem of one tensor, which gets a row more after certain steps; counts how often its loss is computed."""

    def __init__(self, count: int = 1, grows: Sequence[int] = (), named: bool = True) -> None:
        self.rows = torch.nn.Parameter(torch.ones(count, 2))
        self.base = torch.optim.SGD([self.rows], 0.1)
        self.change = Restructure(self._grow, lambda step: step in grows) if grows else None
        self.named, self.calls, self.repeatable = named, 0, True

    @torch.no_grad()
    def _grow(self, step: int) -> torch.Tensor:
        parents = torch.arange(len(self.rows) + 1).clamp(max=len(self.rows) - 1)
        self.rows = torch.nn.Parameter(self.rows[parents])
        self.base.param_groups[0]["params"] = [self.rows]
        return parents

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.base]

    def measured(self) -> list[torch.optim.Optimizer]:
        return [self.base]

    def loss(self, step: int) -> Losses:
        self.calls += 1
        return Losses((self.rows - math.sin(step)).square().mean(), {}, {})

    def carry(self) -> None:
        return None

    def restructure(self) -> Restructure | None:
        return self.change

    def counts(self) -> dict[str, int]:
        return {"rows": len(self.rows)} if self.named else {}

    def lr_scheduler(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def cheap_run(record: RunRecord, steps: int, window: int, problem: Rows | None = None) -> int:
    """Steps of a few numbers, recorded as a stage's are; returns how often their gradient was computed."""
    problem, end = problem or Rows(named=False), record.step + steps
    optimizer = ParallelPicardOptimizer(
        problem.base,
        window=window,
        tolerance=0.0,
        audit="never",
        total_steps=end,
        restructure=problem.restructure(),
    )
    optimizer.step_index = record.step
    recorder = Recorder(record, problem, optimizer, 0.0)
    train(problem, optimizer, recorder, end, lambda *_: None, lambda: None)
    return problem.calls


def test_totals_count_what_histories_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "HISTORY", 20)
    record, calls = RunRecord(), 0
    for _ in range(3):  # a run that was resumed twice
        calls += cheap_run(record, 30, window=2)
    assert (record.step, len(record.losses)) == (90, 90)
    assert record.drift_evaluations == calls == 90 + record.wasted_evaluations
    assert len(record.strides) == len(record.residuals) == len(record.tolerances) == 20
    assert 45 <= record.sweeps <= 90
    assert record.mean_stride == 90 / record.sweeps
    assert title_of(record) == f"90 steps in {record.sweeps} sweeps; the last 20 sweeps are shown"


@pytest.mark.slow  # half a minute
def test_a_run_of_25000_sweeps_reports_25000() -> None:
    record = RunRecord()
    for _ in range(2):
        cheap_run(record, 12_500, window=1)
    assert (record.step, len(record.losses)) == (25_000, 25_000)
    assert record.sweeps == record.drift_evaluations == 25_000
    assert record.mean_stride == 1.0
    assert len(record.strides) == record_module.HISTORY


def test_the_plot_says_which_part_it_shows(tmp_path: Path) -> None:
    pictures = []
    for sweeps in (2, 400):
        record = RunRecord(step=2 * sweeps, sweeps=sweeps, strides=[1, 2])
        record.residuals = record.tolerances = [[1e-9], [1e-8]]
        save_strides_plot(record, 2, tmp_path / "plot.png")
        pictures.append(np.asarray(Image.open(tmp_path / "plot.png")))
    assert (pictures[0] != pictures[1]).any()
    assert title_of(RunRecord(step=4, sweeps=2, strides=[1, 2])) == "4 steps in 2 sweeps"


def test_the_plot_shows_where_stages_begin() -> None:
    record = RunRecord(step=12, sweeps=6, strides=[2] * 4)  # the first two sweeps are not kept
    record.residuals = record.tolerances = [[1e-9]] * 4
    figure = strides_figure(record, 2, [("coarse", 1), ("middle", 2), ("fine", 3)])
    upper = figure.axes[0]
    assert [text.get_text().strip() for text in upper.texts] == ["middle", "fine"]
    assert [text.get_position()[0] for text in upper.texts] == [1.5, 2.5]
    for panel in figure.axes:
        upright = {
            float(line.get_xdata()[0]) for line in panel.lines if len(set(line.get_xdata())) == 1
        }
        assert {1.5, 2.5} <= upright
    assert not strides_figure(record, 2).axes[0].texts


def test_a_record_is_written_without_tensors_and_read_again(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    record = RunRecord({"window": 3}, 2, [1.5, math.nan], 1, 3, 1, [2], [[1e-9, math.inf]], [[1.0]])
    record.save(folder)
    json.loads(
        folder.record.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    again = RunRecord.load(folder)
    assert again.losses[0] == 1.5
    assert math.isnan(again.losses[1])
    assert (again.step, again.sweeps, again.strides, again.figures) == (2, 1, [2], {"window": 3})


def test_the_record_of_a_run_adds_its_stages_up() -> None:
    first = RunRecord({"steps": 4, "window": 2}, 4, [4.0, 3.0, 2.0, 1.0], 3, 6, 2, [1, 1, 2])
    second = RunRecord({"steps": 2, "window": 3}, 2, [0.5, 0.25], 1, 2, 0, [2], seconds=1.5)
    whole = RunRecord.of_stages([first, second])
    assert whole.figures == {"steps": 6, "window": 3}
    assert (whole.step, whole.sweeps, whole.drift_evaluations, whole.seconds) == (6, 4, 8, 1.5)
    assert whole.losses == [4.0, 3.0, 2.0, 1.0, 0.5, 0.25]
    assert whole.strides == [1, 1, 2, 2]


# -- numbers of parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
def test_numbers_are_recorded_where_they_change(window: int) -> None:
    record = RunRecord()
    cheap_run(record, 12, window, Rows(grows=(3, 7, 8)))
    assert [(steps, count) for steps, _, count in record.counts["rows"]] == [
        (0, 1),
        (4, 2),
        (8, 3),
        (9, 4),
    ]
    assert [steps for steps, _ in record.restructured] == [4, 8, 9]
    assert record.restructured == [entry[:2] for entry in record.counts["rows"][1:]]
    # The window ends at each change: what the sweeps until then made final are the steps until then.
    for steps, sweeps in record.restructured:
        assert sum(record.strides[:sweeps]) == steps
    if window == 1:
        assert record.restructured == [[4, 4], [8, 8], [9, 9]]


def test_a_stopped_run_goes_on_with_its_numbers(tmp_path: Path) -> None:
    folder, whole, record = StageFolder(tmp_path), RunRecord(), RunRecord()
    cheap_run(whole, 12, 1, Rows(grows=(3, 7)))
    cheap_run(record, 5, 1, Rows(grows=(3, 7)))
    record.save(folder)
    record = RunRecord.load(folder)
    cheap_run(record, 7, 1, Rows(2, grows=(3, 7)))
    assert (record.counts, record.restructured) == (whole.counts, whole.restructured)
    assert record.counts == {"rows": [[0, 0, 1], [4, 4, 2], [8, 8, 3]]}


def test_what_was_not_recorded_for_an_error_is_caught_up() -> None:
    """A scheduler that fails comes between a committed step and its record."""
    record, problem = RunRecord(), Rows(grows=(2,))

    class Failing:
        def step(self) -> None:
            if len(problem.rows) == 2:
                raise RuntimeError("no rate")

    problem.lr_scheduler = Failing  # type: ignore[assignment, method-assign]
    optimizer = ParallelPicardOptimizer(
        problem.base, window=1, tolerance=0.0, audit="never", restructure=problem.restructure()
    )
    recorder = Recorder(record, problem, optimizer, 0.0)
    with pytest.raises(RuntimeError, match="no rate"):
        train(problem, optimizer, recorder, 9, lambda *_: None, lambda: None)
    assert (record.step, len(record.losses)) == (3, 3)
    assert (record.counts["rows"], record.restructured) == ([[0, 0, 1], [3, 3, 2]], [[3, 3]])


def test_records_of_before_there_were_numbers_are_read_and_gone_on_with(tmp_path: Path) -> None:
    folder, record = StageFolder(tmp_path), RunRecord()
    cheap_run(record, 4, 1)
    assert (record.counts, record.restructured) == ({}, [])
    record.save(folder)
    old = json.loads(folder.record.read_text())
    del old["counts"], old["restructured"]
    folder.record.write_text(json.dumps(old))
    record = RunRecord.load(folder)
    cheap_run(record, 4, 1, Rows(3, grows=(5,)))
    assert record.counts == {"rows": [[4, 4, 3], [6, 6, 4]]}
    assert record.restructured == [[6, 6]]


def test_the_numbers_of_stages_are_joined() -> None:
    first = RunRecord({}, 6, sweeps=3, counts={"rows": [[0, 0, 5], [4, 2, 8]]})
    first.restructured = [[4, 2], [6, 3]]
    other = RunRecord({}, 4, sweeps=4, counts={"rows": [[0, 0, 7]], "faces": [[0, 0, 2]]})
    other.restructured = [[1, 1]]
    last = RunRecord({}, 2, sweeps=2, counts={"faces": [[0, 0, 2], [1, 1, 9]]})
    whole = RunRecord.of_stages([first, other, last])
    assert whole.counts == {
        "rows": [[0, 0, 5], [4, 2, 8], [6, 3, 8], [6, 3, 7], [10, 7, 7]],
        "faces": [[6, 3, 2], [10, 7, 2], [10, 7, 2], [11, 8, 9], [12, 9, 9]],
    }
    assert whole.restructured == [[4, 2], [6, 3], [7, 4]]
    assert first.counts == {"rows": [[0, 0, 5], [4, 2, 8]]}
