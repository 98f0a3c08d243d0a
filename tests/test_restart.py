"""torchrun restarts the workers after a crash, and training goes on from the last checkpoint, bitwise."""

import datetime
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from picardopt import RankLostError
from picardopt.launch import _store_of_attempt, init_process_group
from tests.helpers.runs import SECONDS, assert_same_bits
from tests.test_launch import environment

SCRIPT = """
import os, signal, sys
import torch
import picardopt

torch.set_num_threads(1)
picardopt.init_process_group()
rank = int(os.environ.get("RANK", "0"))
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
crashes = {0: (1, 8), 1: (0, 14)} if "RANK" in os.environ else {}
checkpoint = sys.argv[1] + ".ckpt"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
base = torch.optim.Adam(model.parameters(), lr=0.05)
optimizer = picardopt.ParallelPicardOptimizer(base, tolerance=0, window=4, carry=model)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
optimizer.lr_scheduler = scheduler
if os.path.exists(checkpoint):
    state = picardopt.load_checkpoint(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
if rank == 0:
    print(f"attempt {attempt} starts at step {optimizer.step_index}", flush=True)

def closure(step):
    victim, at = crashes.get(attempt, (-1, -1))
    if rank == victim and step >= at:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    loss = (model(torch.randn(8, 3)) - 1).square().mean()
    loss.backward()
    return loss

while optimizer.step_index < 20:
    optimizer.step(closure)
    scheduler.step()
    if rank == 0 and optimizer.step_index % 3 == 0:
        picardopt.save_checkpoint(checkpoint, {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        })
if rank == 0:
    torch.save((model.state_dict(), optimizer.base.state_dict()), sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(["--standalone", "--nproc-per-node=2"], id="c10d"),
        pytest.param(
            ["--standalone", "--nproc-per-node=3"], id="c10d of three", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--master-port=29641", "--nproc-per-node=3"], id="static", marks=pytest.mark.slow
        ),
    ],
)
def test_killed_twice_and_restarted_by_torchrun(tmp_path: Path, way: list[str]) -> None:
    """In the environment as it is; a rank is killed with SIGKILL in the middle of a sweep."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", *way, "--max-restarts=2"]
    told = {}
    for name, options in {"uninterrupted": [], "restarted": torchrun}.items():
        done = subprocess.run(
            [sys.executable, *options, str(script), str(tmp_path / name)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        told[name] = [line for line in done.stdout.splitlines() if line.startswith("attempt")]
    starts = [int(line.split()[-1]) for line in told["restarted"]]
    assert len(starts) == 3, told
    assert starts[0] == 0 < starts[1] < starts[2]
    assert all(start % 3 == 0 for start in starts)
    expected, got = (torch.load(tmp_path / name) for name in told)
    assert_same_bits(got, expected)


def meet(store: dist.Store, size: int, late: int) -> list[int]:
    """How many had come before each rank into the store of one attempt; one of them comes late."""
    arrivals: list[int] = []

    def join(rank: int) -> None:
        if rank == late:
            time.sleep(0.3)
        arrivals.append(_store_of_attempt(store, rank, size).add("arrivals", 1))

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return sorted(arrivals)


def test_each_attempt_has_a_store_of_its_own() -> None:
    """Whoever comes first finds what earlier attempts left, and does not take it for this one's."""
    store = dist.HashStore()
    for late in (0, 1, 2, 0):
        assert meet(store, 3, late) == [1, 2, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """An error within the timeout, also where an earlier attempt's name is found; it says what to do."""
    second = datetime.timedelta(seconds=1)
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=second)
    dist.PrefixStore("picardopt", agent).set("attempt", "an earlier one")
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
    told["TORCHELASTIC_RESTART_COUNT"] = "0"
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(RankLostError, match="same torchrun command on every host"):
        init_process_group("gloo", timeout=second)
    assert time.monotonic() - began < SECONDS
    assert not dist.is_initialized()


def test_without_a_launcher_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    init_process_group()
    assert not dist.is_initialized()


def test_a_launcher_without_an_agent_is_torchs_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process started by hand, as mpirun or srun start many."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    init_process_group("gloo")
    try:
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
    assert os.environ["RANK"] == "0"
