"""The launcher, torchrun, process groups and what a closure may return on processes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from picardopt import ParallelPicardOptimizer, PicardWarning, launch
from tests.helpers.pool import ROOT, Pools
from tests.helpers.runs import (
    Case,
    Trace,
    assert_parallel,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    parallel,
    sequential,
    wrap,
)

CASE = Case("network", "Adam", steps=12)

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from picardopt import ParallelPicardOptimizer

torch.set_num_threads(1)
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(5))
optimizer = ParallelPicardOptimizer(torch.optim.Adam([weight], lr=0.1), tolerance=0, window=3)

def closure(step):
    optimizer.zero_grad()
    loss = (weight * torch.randn(5)).sum() + torch.round(weight).detach().sum()
    loss.backward()
    return loss

for _ in range(10):
    optimizer.step(closure)
if int(os.environ.get("RANK", "0")) == 0:
    torch.save((weight.detach(), optimizer.stats.sweeps), sys.argv[1])
if dist.is_initialized():
    dist.destroy_process_group()
"""


def trained(case: Case) -> Trace:
    torch.set_num_threads(1)
    assert dist.is_initialized()
    return parallel(case)


def fails_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted in rank 1")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_function_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results by rank, each of them the sequential run."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traces = launch(trained, workers=2, args=(CASE,))
    assert len(traces) == 2
    for trace in traces:
        assert_same_trace(trace, sequential(CASE))
        assert_parallel(trace)


def test_an_error_in_a_launched_function_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="planted in rank 1"):
            launch(fails_on_one_rank, workers=2)


@pytest.mark.parametrize("workers", [0, -1, 1.5])
def test_wrong_numbers_of_workers(workers: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="workers"):
        launch(trained, workers=workers, args=(CASE,))


WAYS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "launch": [
        "-c",
        "import sys; from picardopt import launch; "
        "launch(sys.argv[1], workers=2, args=tuple(sys.argv[2:]))",
    ],
}


@pytest.mark.slow  # quicker: `test_restart.py` compares torchrun's bits, here a function is launched
@pytest.mark.parametrize("way", ["torchrun", "launch"])
def test_one_script_alone_and_on_two_processes(tmp_path: Path, way: str) -> None:
    """``python train.py`` and ``torchrun ... train.py`` end with the same bits."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = []
    for name, options in {"python": [], way: WAYS[way]}.items():
        out = tmp_path / f"{name}.pt"
        done = subprocess.run(
            [sys.executable, *options, str(script), str(out)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        results.append(torch.load(out))
    (alone, sweeps), (together, same_sweeps) = results
    assert_same_bits(together, alone)
    assert sweeps == same_sweeps < 10


def in_two_halves(kind: str) -> Any:
    """Ranks 0, 1 and ranks 2, 3 train apart, each half on its own seed."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    group: Any = halves[mine]
    if kind == "mesh":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("job", "picard"))
        group = mesh["picard"]
    trace = parallel(Case("network", "Adam", seed=mine), process_group=group)
    dist.barrier()
    return trace


@pytest.mark.parametrize("kind", ["group", "mesh"])
def test_a_given_process_group(pools: Pools, kind: str) -> None:
    for rank, trace in enumerate(pools(4).run(in_two_halves, kind)):
        assert_same_trace(trace, sequential(Case("network", "Adam", seed=rank // 2)))
        assert_parallel(trace)
        assert len(trace.stats["residuals"][0]) == 2


def returning(kind: str) -> list[Any]:
    """What ``step`` returns, for closures that return other things than a scalar tensor."""
    problem, optimizer, _ = wrap(CASE)
    plain = make_closure(problem, optimizer.zero_grad)

    def closure(step: int) -> Any:
        loss = plain(step)
        results = {
            "float": lambda: float(loss.detach()),
            "none": lambda: None,
            "vector": lambda: torch.stack([loss, loss * 2]),
            "bf16": lambda: loss.bfloat16(),
            "dict": lambda: {"loss": float(loss.detach()), "step": step},
            "tensors": lambda: {"loss": loss, "parts": (loss * 2, step)},
        }
        return results[kind]()

    return [optimizer.step(closure) for _ in range(CASE.steps)]


@pytest.mark.parametrize("kind", ["float", "none", "vector", "bf16", "dict", "tensors"])
def test_what_a_closure_may_return(pools: Pools, kind: str) -> None:
    """Every rank gets the loss of the step, whichever rank evaluated it."""
    losses = [float(loss) for loss in sequential(CASE).losses]
    for got in pools(3).run(returning, kind):
        assert len(got) == CASE.steps
        for step, (value, loss) in enumerate(zip(got, losses, strict=True)):
            exact = torch.tensor(loss)
            expected = {
                "float": loss,
                "none": None,
                "vector": torch.stack([exact, exact * 2]),
                "bf16": exact.bfloat16(),
                "dict": {"loss": loss, "step": step},
                "tensors": {"loss": exact, "parts": (exact * 2, step)},
            }[kind]
            assert_same_bits(value, expected, f"step {step}")


def copied() -> tuple[str, Trace]:
    """A deepcopy has no group, says so, and runs its window alone."""
    import copy

    _, optimizer, _ = wrap(CASE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = copy.deepcopy(optimizer)
    assert isinstance(twin, ParallelPicardOptimizer)
    (warning,) = [w for w in caught if issubclass(w.category, PicardWarning)]
    return str(warning.message), parallel(CASE)


def test_copies_leave_the_group(pools: Pools) -> None:
    for message, trace in pools(2).run(copied):
        assert "group" in message
        assert_same_trace(trace, sequential(CASE))


def timed() -> dict[str, float]:
    problem, optimizer, _ = wrap(CASE)
    closure = make_closure(problem, optimizer.zero_grad)
    for _ in range(CASE.steps):
        optimizer.step(closure)
    return optimizer.stats.seconds


def test_seconds_are_counted_by_phase(pools: Pools) -> None:
    for seconds in pools(2).run(timed):
        assert set(seconds) == {"drift", "exchange", "rollout", "commit", "audit"}
        assert all(value > 0 for value in seconds.values())
