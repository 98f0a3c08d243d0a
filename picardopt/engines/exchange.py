"""Every rank gives every rank one equally long message: the only thing that goes over the wire.

gloo: point to point, because every rank then hears of a dead peer at once (a ring leaves distant ranks
waiting for a whole timeout) and because it was about three times as fast as gloo's all_gather on loopback.
A rank that lost a peer closes its connections, as NCCL aborts a communicator: another rank may be one exchange
ahead, and wait for this one. A thread waits, so that Ctrl-C is seen at once. NCCL: all_gather on the device;
never run by us on several GPUs so far.
"""

from __future__ import annotations

import atexit
import datetime
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.errors import DesynchronizedError, RankLostError
from picardopt.interrupts import interrupts_allowed
from picardopt.mesh import Circle

_UNUSED_TAG = 0x7069
REMEDY = "restart the job and resume from its last checkpoint"


class Exchange(Protocol):
    """Shares messages between ranks."""

    device: torch.device
    """Where messages must lie."""
    timeout: float
    """Seconds that any rank is waited for."""

    def share(self, message: Tensor, out: Tensor, circle: Circle) -> None:
        """Gathers the message of every rank of a circle.

        Args:
            message: uint8 tensor [n], the same n on every rank.
            out: uint8 tensor [ranks, n]; row r becomes the message of the circle's rank r.
            circle: The ranks that all do the same now.

        Raises:
            RankLostError: If a rank died or did not answer within the timeout.
            DesynchronizedError: If an earlier exchange was cut off.
        """
        ...


def make_exchange(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Exchange:
    """The exchange that fits a group's backend for `device`; smaller circles have the same backend."""
    backend = dist.get_backend_config(group) if device.type != "cpu" else ""
    if device.type != "cpu" and f"{device.type}:nccl" in str(backend):
        return CollectiveExchange(device, timeout)
    return PairwiseExchange(timeout)


@dataclass
class _Wait:
    works: Sequence[tuple[int, Any]]
    timeout: datetime.timedelta
    done: threading.Event = field(default_factory=threading.Event)
    peer: int = -1
    error: Exception | None = None


class PairwiseExchange:
    """Point-to-point exchange in host memory (gloo).

    The groups it was given are closed once a rank is lost: nothing else can be sent through them either.

    Args:
        timeout: Seconds that any rank is waited for.
    """

    device = torch.device("cpu")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._broken = ""
        self._waits: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: tuple[dist.ProcessGroup, _Wait] | None = None
        self._circles: dict[dist.ProcessGroup, Circle] = {}

    def share(self, message: Tensor, out: Tensor, circle: Circle) -> None:
        """See `Exchange.share`."""
        if self._broken:
            raise DesynchronizedError(f"an earlier exchange was cut off ({self._broken}): {REMEDY}")
        out[circle.place].copy_(message)
        if circle.size == 1:
            return
        self._broken = "interrupted"
        try:
            wait = self._post(out, circle)
        except RuntimeError as error:
            self._broken = str(error)
            self._close()
            raise RankLostError(f"a rank could not be reached ({error}): {REMEDY}") from error
        with interrupts_allowed():
            finished = wait.done.wait(self.timeout)
        if not finished or wait.error is not None:
            reason = "died or left" if finished else f"did not answer within {self.timeout:g} s"
            self._broken = f"rank {wait.peer} {reason}"
            if finished:
                self._close()
            raise RankLostError(f"{self._broken}: {REMEDY}") from wait.error
        self._broken = ""

    def _post(self, out: Tensor, circle: Circle) -> _Wait:
        works = []
        self._circles[circle.group] = circle
        turns = range(1, circle.size)
        for index in ((circle.place + turn) % circle.size for turn in turns):
            work = dist.irecv(out[index], group=circle.group, group_src=circle.peers[index])
            works.append((circle.names[index], work))
        for index in ((circle.place - turn) % circle.size for turn in turns):
            work = dist.isend(out[circle.place], group=circle.group, group_dst=circle.peers[index])
            works.append((circle.names[index], work))
        # The backend's own limit lies behind ours, so that ours names the rank.
        wait = _Wait(works, datetime.timedelta(seconds=self.timeout + 5))
        self._last = circle.group, wait
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve, args=(self._waits,), name="picardopt-exchange", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._waits.put, None).atexit = False
            _EXCHANGES.add(self)
        self._waits.put(wait)
        return wait

    def _end(self) -> None:
        """Ends a wait that was given up, so that the interpreter can leave in peace."""
        if self._last is None or self._last[1].done.is_set():
            return
        group, wait = self._last
        with suppress(Exception):
            group._get_backend(self.device).abort()
        wait.done.wait(2.0)

    def _close(self) -> None:
        """Closes the connections of every group used, so that whoever waits for this rank hears of it at once.

        gloo's abort leaves them open; what closes them is a wait of this rank that comes to its timeout.
        """
        never, soon = torch.empty(1, dtype=torch.uint8), datetime.timedelta(milliseconds=1)
        for group, circle in self._circles.items():
            for turn in range(1, circle.size):
                peer = circle.peers[circle.place - turn]
                with suppress(RuntimeError):
                    work: Any = dist.irecv(never, group=group, group_src=peer, tag=_UNUSED_TAG)
                    work.wait(soon)


_EXCHANGES: weakref.WeakSet[PairwiseExchange] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for exchange in list(_EXCHANGES):
        exchange._end()


def _serve(waits: queue.SimpleQueue[_Wait | None]) -> None:
    """Waits for posted works, one exchange after the other, for as long as the exchange lives."""
    while (wait := waits.get()) is not None:
        try:
            for peer, work in wait.works:
                wait.peer = peer
                work.wait(wait.timeout)
        except Exception as error:
            wait.error = error
        wait.done.set()
        del wait  # what it holds is not needed until the next one comes


class CollectiveExchange:
    """all_gather on the accelerator (NCCL).

    Args:
        device: This rank's accelerator.
        timeout: Seconds that the slowest rank is waited for.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self.device, self.timeout = device, timeout
        self._broken = False

    def share(self, message: Tensor, out: Tensor, circle: Circle) -> None:
        """See `Exchange.share`."""
        if self._broken:
            raise DesynchronizedError(f"an earlier exchange was cut off: {REMEDY}")
        if circle.size == 1:
            out[0].copy_(message)
            return
        self._broken = True
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        in_order = list(circle.peers) == sorted(circle.peers)
        into = out if in_order else torch.empty_like(out)
        try:
            work = gather(into.view(-1), message.contiguous(), group=circle.group, async_op=True)
            deadline, pause = time.monotonic() + self.timeout, 1e-5
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RankLostError(
                        f"a rank did not answer within {self.timeout:g} s: {REMEDY}"
                    )
                with interrupts_allowed():
                    time.sleep(pause)
                pause = min(2 * pause, 1e-3)
            work.wait()
        except dist.DistBackendError as error:
            raise RankLostError(f"a rank died ({error}): {REMEDY}") from error
        if not in_order:
            out.copy_(into[list(circle.peers)])
        self._broken = False
