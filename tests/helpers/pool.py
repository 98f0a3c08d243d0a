"""Worker processes for the tests: real, joined by gloo, one thread each.

They are forked off a server that has imported torch and started nothing: importing it takes each
process seconds. A pool of one world size serves the whole session. ``Pool.run(function, *args)``
calls the module-level ``function(*args)`` on every rank and returns the results by rank; exceptions
travel back with their traceback; a pool that a worker left hanging, or lost, is killed and made anew.
"""

import datetime
import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The repository, from which workers import jobs as `tests. ...`."""
TIMEOUT = 120.0
"""Seconds that a job may take before its pool is killed."""
GROUP_TIMEOUT = 60.0
"""Seconds that one collective may take."""


@dataclass
class Outcome:
    """What became of a job on one rank: a value, an error, or (both None) a lost process."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    """The worker's own traceback."""
    lost: bool = False
    seconds: float = 0.0


class WorkerError(RuntimeError):
    """A job failed in a worker; the message holds the worker's traceback."""


def _portable(error: BaseException) -> BaseException:
    try:
        copied = pickle.loads(pickle.dumps(error))
        if type(copied) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _work(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    from tests.helpers.leaks import seed

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Torch 2.4 and 2.5 warn of how they themselves read pickled tensors.
    warnings.filterwarnings("ignore", "You are using `torch.load` with", FutureWarning)
    warnings.filterwarnings("ignore", "DTensor random operators may not have", UserWarning)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT),
    )
    connection.send_bytes(pickle.dumps(Outcome(rank)))
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        started = time.perf_counter()
        outcome = Outcome(rank)
        seed(1 + rank)  # ranks differ, and no job sees what one before it drew
        try:
            function, args = pickle.loads(job)
            outcome.value = function(*args)
        except BaseException as error:
            outcome.error, outcome.text = _portable(error), traceback.format_exc()
        outcome.seconds = time.perf_counter() - started
        try:
            answer = pickle.dumps(outcome)
        except Exception:
            answer = pickle.dumps(Outcome(rank, error=WorkerError(traceback.format_exc())))
        connection.send_bytes(answer)


@functools.cache
def _forks() -> ForkServerContext:
    """Makes processes that have imported what jobs need; the server begins with the environment of now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.runs", "torch._dynamo"])
    changed = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return context


class Pool:
    """``world_size`` processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="picardopt-tests-")
        store = str(Path(self.folder.name) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = _forks().Pipe()
            process = _forks().Process(
                target=_work, args=(rank, world_size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        self.broken = False
        for outcome in self._gather(TIMEOUT):
            if outcome.lost:
                raise WorkerError(f"worker {outcome.rank} of {world_size} did not start")

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Sends one job to every rank without waiting for it."""
        job = pickle.dumps((function, args))
        for connection in self.connections:
            connection.send_bytes(job)

    def _gather(self, timeout: float) -> list[Outcome]:
        """Waits for every rank's answer; kills the pool if one is late."""
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        pending = dict(zip(self.connections, range(self.world_size), strict=True))
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise TimeoutError(f"ranks {sorted(pending.values())} hang after {timeout} s")
            for connection in (one for one in self.connections if one in ready):
                rank = pending.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    outcomes[rank] = Outcome(rank, lost=True)
                    self.broken = True
        return [outcomes[rank] for rank in range(self.world_size)]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
    ) -> list[Outcome]:
        """Runs a job on every rank and returns what became of each, errors included."""
        self.submit(function, *args)
        return self._gather(timeout)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Runs a job on every rank and returns the results by rank; raises if one failed."""
        outcomes = self.outcomes(function, *args, timeout=timeout)
        failed = [outcome for outcome in outcomes if outcome.error is not None or outcome.lost]
        if failed:
            self.kill()  # a rank that failed alone may have left messages behind
            raise WorkerError(
                "\n".join(f"rank {outcome.rank}:\n{outcome.text or 'lost'}" for outcome in failed)
            )
        return [outcome.value for outcome in outcomes]

    def kill(self) -> None:
        """Ends every process of this pool."""
        self.broken = True
        if not self.processes:
            return
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for connection in self.connections:
            connection.close()
        self.processes.clear()
        self.folder.cleanup()


class Pools:
    """One pool per world size, made when first asked for and again when broken."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        pool = self._pools.get(world_size)
        if pool is None or pool.broken:
            pool = self._pools[world_size] = Pool(world_size)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            if not pool.broken:
                pool.kill()


def _meet() -> None:
    """Waits for the others, so that short timeouts start fair."""
    import torch.distributed as dist

    dist.barrier()


@contextmanager
def fresh_pool(world_size: int) -> Iterator[Pool]:
    """A pool of its own for a test that kills a worker or leaves the group out of step."""
    pool = Pool(world_size)
    try:
        pool.run(_meet)
        yield pool
    finally:
        pool.kill()
