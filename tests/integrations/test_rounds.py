"""The table of `benchmarks/rounds.py`: every seed of every cell, and what the stored one says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("rounds", "result_store", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import rounds

    return rounds


def test_every_picard_cell_is_run_for_every_seed(rounds: ModuleType) -> None:
    runs = rounds.trials("exact", 3)
    cells = len(rounds.lines()) * len(rounds.SETTINGS) * len(rounds.WINDOWS)
    assert len({run.name for run in runs}) == len(runs) == 3 * cells
    assert {run.seed for run in runs} == {0, 1, 2}


def test_a_cell_is_the_mean_over_its_seeds(rounds: ModuleType) -> None:
    runs = {"exact/easy/spread": {"parameters": 2.0, "pictures": 4.0}}
    for seed in range(3):
        name = rounds.Run("exact", "easy", seed, "accept everything", "coast", 8).name
        each = {"steps_per_sweep": 6.0 + seed, "accepted": 0.5, "psnr": 20.0}
        runs[name] = each | {"parameters": 1.0 + seed, "pictures": 1.0}
    assert "| 7.00 (50 %) @ 100 / 25.0; 20.00 dB |" in rounds.table(runs, "exact", 3)
    del runs[name]
    assert "| 6.50 (50 %) @ 75.0 / 25.0; 20.00 dB [2/3] |" in rounds.table(runs, "exact", 3)


def test_the_stored_table_is_its_runs_and_says_how_many_there_are(rounds: ModuleType) -> None:
    content = json.loads((BENCHMARKS / "results" / "rounds.json").read_text())
    stored = (BENCHMARKS / "results" / "rounds.md").read_text()
    for part in rounds.body(content):
        assert part.strip() in stored
    if "weights" not in content["setup"]:  # runs of the model that was replaced
        assert "one run, of seed 0" in stored
