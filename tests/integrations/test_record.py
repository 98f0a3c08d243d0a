"""The record of a long run: totals count everything, histories are bounded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import picardopt_3d.run.record as record_module
import pytest
import torch
from picardopt_3d.export.plots import save_strides_plot, title_of
from picardopt_3d.problem import Losses
from picardopt_3d.run.folder import StageFolder
from picardopt_3d.run.record import Recorder, RunRecord
from PIL import Image

from picardopt import ParallelPicardOptimizer


def cheap_run(record: RunRecord, steps: int, window: int) -> int:
    """Steps of one number, recorded as a stage's are; returns how often its gradient was computed."""
    parameter, calls = torch.nn.Parameter(torch.ones(1)), 0
    end = record.step + steps
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD([parameter], 0.1),
        window=window,
        tolerance=0.0,
        audit="never",
        total_steps=end,
    )
    optimizer.step_index = record.step
    recorder = Recorder(record, optimizer, 0.0)

    def closure(step: int) -> Losses:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (parameter - math.sin(step)).square().sum()
        loss.backward()
        return Losses(loss, {}, {})

    for step in range(record.step, end):
        recorder.took(step, optimizer.step(closure))
    recorder.count()
    return calls


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
