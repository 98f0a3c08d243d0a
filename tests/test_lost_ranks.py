"""A rank dies, stops, leaves or is interrupted: an error on the others within seconds, never a hang.

Each test has a pool of its own, since the group is lost with the rank.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt import PicardError, RankLostError
from picardopt.compat import irecv, isend
from picardopt.ranks import make_grid
from picardopt.transport import PairwiseTransport
from tests.helpers.pool import fresh_pool
from tests.helpers.runs import (
    SECONDS,
    Case,
    Trace,
    assert_same_bits,
    attempt,
    make_closure,
    sequential,
    wrap,
)
from tests.test_launch import environment

CASE = Case("network", "Adam", steps=14)


def dying(how: str, at: int, victim: int, timeout: float) -> dict[str, Any]:
    """One rank kills itself, leaves the loop early or stops, at a given evaluation of its closure."""
    problem, optimizer, _ = wrap(CASE, timeout=timeout)
    healthy = make_closure(problem, optimizer.zero_grad)
    evaluations = 0

    def closure(step: int) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if dist.get_rank() == victim and evaluations == at:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "end":
                os.kill(os.getpid(), signal.SIGTERM)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        return healthy(step)

    trace = Trace()
    steps = CASE.steps
    if how == "leave" and dist.get_rank() == victim:
        steps = at
    report = attempt(trace, problem, optimizer, closure, steps)
    report["trace"] = trace
    if how == "leave" and dist.get_rank() == victim:
        os._exit(0)
    try:
        optimizer.step(healthy)
        report["again"] = None
    except PicardError as error:
        report["again"] = type(error).__name__
    return report


def assert_survivors(outcomes: list[Any], victim: int, seconds: float) -> None:
    expected = sequential(CASE)
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.lost
            continue
        assert outcome.error is None, outcome.text
        report = outcome.value
        assert report["error"] == RankLostError.__name__, report["text"]
        assert "rank" in report["message"]
        assert report["seconds"] < seconds
        # Parameters and state are at the last commit, and the next call fails at once.
        got, count = report["trace"], report["committed"]
        assert report["step_index"] == count == len(got.losses)
        for name, values in expected.parts().items():
            assert_same_bits(got.parts()[name], values[:count], name)
        assert report["again"] is not None


@pytest.mark.parametrize(
    ("world", "at", "victim"),
    [(3, 2, 0), (4, 3, 2), pytest.param(2, 1, 1, marks=pytest.mark.slow)],
)
def test_kill_9(world: int, at: int, victim: int) -> None:
    with fresh_pool(world) as pool:
        outcomes = pool.outcomes(dying, "kill", at, victim, 60.0)
    assert_survivors(outcomes, victim, SECONDS)


def half_an_exchange(timeout: float) -> dict[str, Any]:
    """Rank 2 dies when rank 0, not rank 1, has its message: rank 0 is an exchange ahead of rank 1, and waits for it."""
    grid = make_grid(None, None)
    assert grid is not None
    group, rows = grid.everyone, torch.zeros((3, 8), dtype=torch.uint8)
    message = torch.full((8,), group.rank, dtype=torch.uint8)
    if group.rank == 2:
        received = [irecv(rows[peer], group.group, peer, 0) for peer in (0, 1)]
        for work in (*received, isend(message, group.group, 0, 0)):
            work.wait()
        time.sleep(1.0)  # the others have begun to wait
        os.kill(os.getpid(), signal.SIGKILL)
    exchange, finished = PairwiseTransport(timeout), 0
    began = time.monotonic()
    try:
        for _ in range(2):
            exchange.all_gather(message, rows, group)
            finished += 1
    except RankLostError as error:
        found = {"finished": finished, "text": str(error), "seconds": time.monotonic() - began}
    return found


def test_a_rank_that_is_ahead_hears_of_the_loss() -> None:
    """It waits for a rank that lives, but that has given up."""
    with fresh_pool(3) as pool:
        ahead, behind, lost = pool.outcomes(half_an_exchange, 60.0)
    assert lost.lost
    assert ahead.error is None, ahead.text
    assert behind.error is None, behind.text
    assert (ahead.value["finished"], behind.value["finished"]) == (1, 0)
    assert "rank 2 died" in behind.value["text"]
    for survivor in (ahead, behind):
        assert survivor.value["seconds"] < SECONDS


def test_sigterm_to_one_rank() -> None:
    """Without a handler it ends that rank at once, the others with an error."""
    with fresh_pool(2) as pool:
        outcomes = pool.outcomes(dying, "end", 2, 1, 60.0)
    assert_survivors(outcomes, 1, SECONDS)


def leaving(seconds: float) -> dict[str, Any]:
    """Rank 1 catches a SIGTERM while rank 0's closure takes long."""
    problem, optimizer, _ = wrap(CASE, timeout=120.0)
    healthy = make_closure(problem, optimizer.zero_grad)

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(3)

    def closure(step: int) -> Tensor:
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(seconds)
        return healthy(step)

    signal.signal(signal.SIGTERM, leave)
    return attempt(Trace(), problem, optimizer, closure, 1)


def test_a_rank_that_catches_sigterm_does_not_wait_for_the_others() -> None:
    """A cluster gives it some seconds; the others may be in the middle of a long drift."""
    with fresh_pool(2) as pool:
        pool.submit(leaving, 60.0)
        assert pool.connections[1].poll(SECONDS + 30)
        report = pickle.loads(pool.connections[1].recv_bytes()).value
    assert report["error"] == "SystemExit"
    assert report["committed"] == report["step_index"] == 0
    assert report["seconds"] < SECONDS


@pytest.mark.parametrize(("world", "at"), [(3, 5)])
def test_a_rank_that_leaves_early(world: int, at: int) -> None:
    """Its process ends while the others go on: an error on them, not a hang."""
    with fresh_pool(world) as pool:
        outcomes = pool.outcomes(dying, "leave", at, 1, 60.0)
    assert_survivors(outcomes, 1, SECONDS)


def leaving_the_loop(timeout: float) -> dict[str, Any]:
    """Rank 1 takes fewer steps than the others but its process lives on."""
    problem, optimizer, _ = wrap(CASE, timeout=timeout)
    closure = make_closure(problem, optimizer.zero_grad)
    steps = 5 if dist.get_rank() == 1 else CASE.steps
    report = attempt(Trace(), problem, optimizer, closure, steps)
    if dist.get_rank() == 1:
        time.sleep(timeout + 1)  # it neither calls nor dies
    return report


def test_a_rank_that_stops_calling() -> None:
    """Bounded by ``timeout``; the error names the rank that is waited for."""
    with fresh_pool(3) as pool:
        outcomes = pool.outcomes(leaving_the_loop, 6.0)
    for outcome in outcomes:
        assert outcome.error is None, outcome.text
        report = outcome.value
        if outcome.rank == 1:
            assert report["error"] == "NoneType"
        else:
            assert report["error"] == RankLostError.__name__, report["text"]
            assert "1" in report["message"]
            assert report["seconds"] < 6.0 + SECONDS


@pytest.mark.slow
def test_a_stopped_rank() -> None:
    """SIGSTOP: the peers wait for ``timeout`` and no longer."""
    with fresh_pool(2) as pool:
        pool.submit(dying, "stop", 3, 1, 6.0)
        assert pool.connections[0].poll(6.0 + 2 * SECONDS)
        outcome = pickle.loads(pool.connections[0].recv_bytes())
        report = outcome.value
    assert report["error"] == RankLostError.__name__
    assert "1" in report["message"]
    assert report["again"] is not None


SCRIPT = """
import os, signal, torch, torch.distributed as dist
from picardopt import ParallelPicardOptimizer

dist.init_process_group("gloo")
weight = torch.nn.Parameter(torch.ones(3))
optimizer = ParallelPicardOptimizer(torch.optim.SGD([weight], lr=0.1), tolerance=0, timeout=2)

def closure(step):
    if step >= 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    optimizer.zero_grad()
    loss = weight.square().sum()
    loss.backward()
    return loss

for _ in range(9):
    optimizer.step(closure)
"""


@pytest.mark.slow
def test_a_process_ends_with_its_error(tmp_path: Path) -> None:
    """Though one of its threads still waits for the stopped rank: an exit status, no abort."""
    script, store = (
        tmp_path / "train.py",
        dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False),
    )
    script.write_text(SCRIPT)
    told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    told["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command, pipe = [sys.executable, str(script)], subprocess.PIPE
    processes = [
        subprocess.Popen(
            command, env=environment() | told | {"RANK": str(rank)}, stderr=pipe, text=True
        )
        for rank in range(2)
    ]
    try:
        _, text = processes[0].communicate(timeout=200)
        assert processes[0].returncode == 1, text
        assert "RankLostError: rank 1 did not answer within 2 s" in text.splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def slow_peer(seconds: float) -> dict[str, Any]:
    """Rank 1 works long on one drift while rank 0 waits for it and gets a Ctrl-C."""
    problem, optimizer, _ = wrap(CASE, timeout=120.0)
    healthy = make_closure(problem, optimizer.zero_grad)

    def closure(step: int) -> Tensor:
        if dist.get_rank() == 1:
            time.sleep(seconds)
        loss = healthy(step)
        if dist.get_rank() == 0:
            # A second after its last drift the rank does nothing but wait, however busy the machine.
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        return loss

    if dist.get_rank() == 0:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        return attempt(Trace(), problem, optimizer, closure, 1)
    attempt(Trace(), problem, optimizer, closure, 1)
    return {}


def test_ctrl_c_while_waiting_for_a_peer() -> None:
    """Seen at once, not when the peer answers."""
    with fresh_pool(2) as pool:
        pool.submit(slow_peer, 60.0)
        assert pool.connections[0].poll(SECONDS + 30)
        report = pickle.loads(pool.connections[0].recv_bytes()).value
    assert report["error"] == "KeyboardInterrupt"
    assert report["committed"] == report["step_index"] == 0
    assert report["seconds"] < SECONDS
