"""Start workers on this host with torch's own elastic launcher, and join those that a launcher started."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from picardopt.addresses import check_addresses
from picardopt.compat import accelerator_module, select_accelerator
from picardopt.errors import RankLostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """Joins the processes that a launcher started; does nothing where there is no launcher.

    It is ``torch.distributed.init_process_group``, but also works after torchrun has restarted the workers
    (``--max-restarts``): torch 2.13 gives the same key-value store to every attempt, where gloo and NCCL then find
    the addresses of dead processes (pytorch#135712).

    Args:
        backend: "gloo", "nccl", ...; None takes one for each kind of device.
        options: More arguments of torch's function (`timeout`, `device_id`, ...).

    Raises:
        RankLostError: If another rank does not come within the timeout.
        RuntimeError: If gloo could not join the hosts; the message says how it can (docs/several-hosts.md).
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    from torch.distributed.rendezvous import rendezvous

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # a new store at each attempt
        dist.init_process_group(backend, **options)
        return
    limit = {"timeout": options["timeout"]} if options.get("timeout") else {}
    store, rank, size = next(iter(rendezvous("env://", **limit)))
    try:
        store = _store_of_attempt(store, rank, size)
        if backend is None or "gloo" in backend:
            check_addresses(store, os.environ)
    except dist.DistStoreError as error:
        raise RankLostError(
            f"a rank did not join, or was lost ({error}): run the same torchrun command on every host, and look for "
            "the first error there"
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)


def _store_of_attempt(store: Store, rank: int, size: int) -> Store:
    """Returns a part of a store that only this attempt's processes use; rank 0 chooses its name.

    The store may hold an earlier attempt's values, and TORCHELASTIC_RESTART_COUNT differs between hosts. A rank
    therefore accepts a name only once rank 0 has answered under it with the rank's own token.

    Raises:
        DistStoreError: If a rank does not come, or does not answer, within the store's timeout.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    store, token = PrefixStore("picardopt", store), uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", token)
        for peer in range(1, size):
            store.set(f"{token}/answer/{peer}", store.get(f"{token}/hello/{peer}").decode())
        return PrefixStore(token, store)
    timeout = cast(Any, store).timeout  # a timedelta, which torch's stubs lack
    limit = time.monotonic() + timeout.total_seconds()
    while True:
        name = store.get("attempt").decode()
        store.set(f"{name}/hello/{rank}", token)
        answer = f"{name}/answer/{rank}"
        while store.get("attempt").decode() == name:
            if store.check([answer]) and store.get(answer).decode() == token:
                return PrefixStore(name, store)
            if time.monotonic() > limit:
                raise dist.DistStoreError(f"rank 0 did not answer within {timeout}")
            time.sleep(0.01)


def launch(
    target: Callable[..., Any] | str | os.PathLike[str],
    *,
    workers: int | None = None,
    args: Sequence[Any] = (),
) -> list[Any]:
    """Runs a function or a script in several worker processes on this host.

    Args:
        target: A module-level function, or a path to a Python script. A function finds
            torch.distributed's default group initialized (NCCL with one accelerator a worker, else gloo)
            and its accelerator selected; a script initializes the group itself, as under torchrun.
        workers: Number of processes; by default one per accelerator, or one per two CPU cores.
        args: Arguments of the function (picklable), or of the script (strings).

    Returns:
        The function's return values, by rank; for a script, a list of None.

    Raises:
        ValueError: If `workers` is not a positive integer.
        FileNotFoundError: If there is no such script.
        KeyboardInterrupt: At Ctrl-C, once the workers are stopped; SIGTERM ends this process likewise.
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: If a worker failed; the others
            are stopped.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = default_workers() if workers is None else workers
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers={workers!r}: give a positive number of processes")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.1,
    )
    if not callable(target) and not Path(target).is_file():
        raise FileNotFoundError(f"target={str(target)!r}: no such script")
    with _own_signal_handlers():
        if callable(target):
            results = elastic_launch(config, _work)(target, tuple(args), workers)
        else:
            command = [sys.executable, "-u", str(target), *map(str, args)]
            results = elastic_launch(config, command[0])(*command[1:])
    return [results[rank] for rank in range(workers)]


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Puts handlers back that torch's launcher leaves changed; the signal that ended it is then theirs."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    before = {number: signal.getsignal(number) for number in _HANDLED}
    received = None
    try:
        yield
    except SignalException as error:
        received = error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
    if received is not None:
        signal.raise_signal(received.sigval)  # KeyboardInterrupt, the end of the process, ...
        raise received


def default_workers() -> int:
    """Returns one worker per accelerator of this host, or one per two CPU cores."""
    module = accelerator_module()
    if module is not None:
        return int(module.device_count())
    return max(1, (os.cpu_count() or 1) // 2)


_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_GRACE = 5.0  # seconds


def _wait_for_all() -> None:
    try:
        dist.barrier()
    except RuntimeError as error:
        raise RankLostError(
            f"another worker ended early ({error}): look for its own error"
        ) from error


def _work(target: Callable[..., Any], args: tuple[Any, ...], workers: int) -> Any:
    """Runs one worker: sets its threads and accelerator, joins the process group, calls the function."""
    # What the imports left is never garbage; looking through it again takes most of a second when the process ends.
    gc.freeze()
    module = accelerator_module()
    if module is not None and module.device_count() >= workers:
        select_accelerator(int(os.environ["LOCAL_RANK"]))
        backend = None  # one for each kind of device
    else:
        backend = "gloo"
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    init_process_group(backend)
    try:
        result = target(*args)
        _wait_for_all()
        return result
    except RankLostError:
        # The consequence of another worker's failure: let the launcher hear of the cause first.
        time.sleep(_GRACE)
        raise
    finally:
        dist.destroy_process_group()
