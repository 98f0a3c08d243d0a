"""What a test may leave to the next one: no setting of the process, no thread, no child process."""

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import optimizer as torch_optimizer

PATIENCE = 20.0
"""Seconds in which what is about to end must have ended, on a crowded machine."""
TASKS = Path("/proc/self/task")
WATCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *os.environ} - {
    "PYTEST_CURRENT_TEST"
}
"""Variables of the environment; what a test is the first to import may set others, and add to the import path."""


def seed(number: int) -> None:
    """Seeds every generator that a test may draw from: what it draws depends on no other test."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Fails where the block changes a setting, or leaves a thread or a process that does not end."""
    before, there = settings(), running()
    yield
    if settings() != before:
        gc.collect()  # an optimizer's hook ends with it, and errors keep their frames in cycles
    after = settings()
    changed = {name: (before[name], after[name]) for name in before if after[name] != before[name]}
    assert not changed, f"left changed, (before, after): {changed}"
    end = time.monotonic() + PATIENCE
    while left := running() - there:
        assert time.monotonic() < end, f"left running: {_described(left)}"
        time.sleep(0.01)


def settings() -> dict[str, Any]:
    """What another test would see."""
    return {
        "folder": os.getcwd(),
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "tracing": (sys.gettrace(), threading.gettrace()),
        "garbage is collected": gc.isenabled(),
        "user": os.geteuid(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "process group": dist.is_initialized(),
        "hooks of every optimizer": (
            len(torch_optimizer._global_optimizer_pre_hooks),
            len(torch_optimizer._global_optimizer_post_hooks),
        ),
        **{f"${name}": os.environ.get(name) for name in WATCHED},
    }


def running() -> set[str]:
    """Threads that keep the interpreter from ending, and processes that this one started.

    Helpers that serve the process to its end stay: Python's own of multiprocessing, whose children the pools' workers
    are, and torch's compiler's. What has ended need not be waited for.
    """
    threads = {f"thread {t.name}" for t in threading.enumerate() if not t.daemon}
    helpers = {
        forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    }
    children = {int(pid) for file in TASKS.glob("*/children") for pid in _text(file).split()}
    left = {child for child in children - helpers if not _has_ended(child)}
    return threads | {
        f"process {child}" for child in left if "_inductor/compile_worker" not in _command(child)
    }


def _command(process: int) -> str:
    return _text(Path(f"/proc/{process}/cmdline")).replace("\0", " ").strip()


def _described(left: set[str]) -> list[str]:
    commands = {each: _command(int(each.split()[1])) for each in left if each.startswith("process")}
    return [f"{each}: {commands[each]}" if each in commands else each for each in sorted(left)]


def _has_ended(process: int) -> bool:
    return _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()[:1] in ([], ["Z"])


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the thread or the process is no longer there
        return ""
