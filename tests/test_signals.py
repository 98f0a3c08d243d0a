"""Ctrl-C and SIGTERM to real programs in the middle of a sweep: out at once, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_launch import WAYS, environment

LIMIT = 25.0
"""Seconds that a program may take to end on a crowded machine; about 1 on an idle one, 30 if torch has to kill it."""
MARK = "PICARDOPT_TEST_MARK"
SHM = "/dev/shm/"

SCRIPT = """
import os, signal, sys, time
import torch
import picardopt

def train(folder, caught):
    rank = os.environ.get("RANK", "0")
    if caught == "caught":
        def leave(number, frame):
            raise SystemExit(7)
        signal.signal(signal.SIGTERM, leave)
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = picardopt.ParallelPicardOptimizer(
        torch.optim.SGD([weight], lr=1.0), window=4, tolerance=0, audit="never")

    def closure(step):
        if step >= 4:
            open(os.path.join(folder, f"{rank}.busy"), "w").close()
            time.sleep(0.5)
        weight.grad = torch.ones(3)
        return -weight.sum()

    try:
        for _ in range(1000):
            optimizer.step(closure)
    finally:  # what a user may rely on when the program is ended
        right = torch.equal(weight.detach(), torch.full((3,), -1.0 * optimizer.step_index))
        told = f"{optimizer.step_index} {right}"
        open(os.path.join(folder, f"{rank}.last"), "w").write(told)

if __name__ == "__main__":
    if len(sys.argv) > 3:
        picardopt.launch(train, workers=2, args=sys.argv[1:3])
    else:
        picardopt.init_process_group("gloo")
        train(*sys.argv[1:])
"""

STARTS = {
    "python": ([], []),
    "torchrun": (WAYS["torchrun"], []),
    "launch script": (WAYS["launch"], []),
    "launch function": ([], ["function"]),
}


def marked(mark: str) -> list[int]:
    """The processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def shared_memory(processes: list[int]) -> set[str]:
    """What processes have in shared memory under a name: others have some too, which comes and goes."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = (Path("/proc") / str(process) / "maps").read_text().splitlines()
            found |= {line.partition(SHM)[2] for line in maps if SHM in line}
    return {name for name in found if not name.endswith(" (deleted)")}


class Program:
    """A training program whose fifth step and those after it are slow."""

    def __init__(self, folder: Path, start: str, caught: str = "") -> None:
        script = folder / "train.py"
        script.write_text(SCRIPT)
        options, more = STARTS[start]
        self.mark, self.folder = uuid.uuid4().hex, folder
        self.ranks = 1 if start == "python" else 2
        self.spawned = bool(more)  # multiprocessing has its locks in shared memory
        self.process = subprocess.Popen(
            [sys.executable, *options, str(script), str(folder), caught, *more],
            env={**environment(), MARK: self.mark},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # In the background of a script SIGINT is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until_busy(self) -> None:
        """Waits until every rank is in the middle of a sweep."""
        deadline = time.monotonic() + 200
        while len(list(self.folder.glob("*.busy"))) < self.ranks:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)

    def worker(self, rank: int) -> int:
        for process in marked(self.mark):
            told = (Path("/proc") / str(process) / "environ").read_bytes()
            if f"RANK={rank}".encode() in told.split(b"\0"):
                return process
        raise AssertionError(f"no rank {rank}")

    def end(self, send: Any) -> tuple[int, str]:
        """Sends a signal and returns the exit code and what was told, once nothing is left."""
        shared = shared_memory(marked(self.mark))
        assert shared or not self.spawned
        started = time.monotonic()
        send()
        text = self.process.communicate(timeout=60)[1]
        seconds = time.monotonic() - started
        assert seconds < LIMIT, text
        print(f"{seconds:.2f} s")
        for _ in range(200):
            if not marked(self.mark) and not shared & set(os.listdir(SHM)):
                break
            time.sleep(0.1)
        assert not marked(self.mark)
        assert not shared & set(os.listdir(SHM))
        return self.process.returncode, text

    def last(self) -> list[str]:
        """What each rank saw on its way out: the step, and whether the parameters were its."""
        return [path.read_text() for path in sorted(self.folder.glob("*.last"))]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Any]:
    started: list[Program] = []

    def start(*args: str) -> Program:
        started.append(Program(tmp_path, *args))
        started[-1].until_busy()
        return started[-1]

    yield start
    for program in started:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.communicate()


def some_slow(*fast: str) -> list[Any]:
    """All ways to start a program; only these in the daily suite, for each takes some seconds."""
    return [
        start if start in fast else pytest.param(start, marks=pytest.mark.slow) for start in STARTS
    ]


@pytest.mark.parametrize("start", some_slow("python"))
def test_ctrl_c(programs: Any, start: str) -> None:
    """As a terminal sends it: to all processes of the program."""
    program = programs(start)
    code, text = program.end(lambda: os.killpg(program.process.pid, signal.SIGINT))
    assert code in ((1, -2) if start == "torchrun" else (-2,)), text
    last = program.last()
    assert len(last) == program.ranks
    assert all(told.endswith("True") for told in last)


@pytest.mark.parametrize("start", some_slow("launch function"))
def test_sigterm(programs: Any, start: str) -> None:
    """As a cluster sends it: to the process that it started."""
    program = programs(start)
    code, text = program.end(lambda: program.process.send_signal(signal.SIGTERM))
    assert code in ((1, -15) if start == "torchrun" else (-15,)), text


@pytest.mark.parametrize("start", ["python", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_sigterm_that_the_program_catches(programs: Any, start: str) -> None:
    """Its handler raises: the parameters are those of the last commit."""
    program = programs(start, "caught")
    code, text = program.end(lambda: program.process.send_signal(signal.SIGTERM))
    assert code == (7 if start == "python" else 1), text
    last = program.last()
    assert len(last) == program.ranks
    assert all(told.endswith("True") for told in last)


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all(programs: Any) -> None:
    program = programs("torchrun")
    code, text = program.end(lambda: os.kill(program.worker(1), signal.SIGTERM))
    assert code == 1
    assert "Signal 15 (SIGTERM) received by PID" in text  # torchrun names the cause
