"""The recorded trajectories hold: to the bit where they were recorded, to rounding on another machine or torch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import core, recipes
from tests.golden.results import assert_near, assert_same, digest, fingerprint, is_here, load
from tests.helpers.pool import Pools
from tests.helpers.versions import needs_3d, needs_torch

RECORDED = load()


def compare(got: dict[str, Any], recorded: dict[str, Any]) -> None:
    """As closely as this machine allows; skips, with the reason, where that is not to the bit."""
    if is_here(RECORDED):
        assert_same(got, recorded)
        return
    assert_near(got, recorded)
    pytest.skip(
        f"agrees to rounding; bits were recorded on {RECORDED['fingerprint']}, this is {fingerprint()}"
    )


BFLOAT16 = needs_torch("2.13", "another arithmetic of bfloat16, with which this one was recorded")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=BFLOAT16 if "bfloat16" in name else ()) for name in core.RUNS],
)
def test_the_core(name: str, pools: Pools) -> None:
    processes = core.RUNS[name].processes
    ranks = [core.run(name)] if processes == 1 else pools(processes).run(core.run, name)
    assert all(other == ranks[0] for other in ranks)
    compare(ranks[0], RECORDED["core"][name])


@needs_3d
@pytest.mark.parametrize("name", recipes.RUNS)
def test_a_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("picardopt_3d.run.outputs.FILM_FRAMES", 4)  # nothing of it is compared
    compare(recipes.run(name, tmp_path), RECORDED["recipes"][name])


def test_every_recorded_run_is_run() -> None:
    assert RECORDED["core"].keys() == core.RUNS.keys()
    assert RECORDED["recipes"].keys() == recipes.RUNS.keys()


def test_runs_run_ahead_and_are_turned_back() -> None:
    """A window of 1 in disguise, or a tolerance that refuses nothing, would prove little."""
    for name, run in {**RECORDED["core"], **RECORDED["recipes"]}.items():
        assert max(run["strides"]) > 1, name
        assert sum(run["strides"]) >= run["steps"] > run["sweeps"], name
    assert sum(run["wasted"] > 0 for run in RECORDED["core"].values()) > 10


def test_a_last_bit_is_seen() -> None:
    values = torch.tensor([1.0, 2.0])
    other = torch.nextafter(values, values + 1)
    assert digest({"b": [values], "a": 1}) == digest({"a": 1, "b": [values.clone()]})
    assert digest([values]) != digest([other])
    assert digest([values]) != digest([values.double()])
    assert digest([torch.zeros(1)]) != digest([-torch.zeros(1)])


def test_the_rough_comparison_can_fail() -> None:
    recorded = RECORDED["core"]["adam, exact, coast"]
    for name, wrong in (("norm", 1.05), ("last_loss", 0.9), ("sweeps", 2)):
        changed = copy.deepcopy(recorded)
        changed[name] *= wrong
        with pytest.raises(AssertionError):
            assert_near(changed, recorded)
    assert_near(recorded, recorded)
