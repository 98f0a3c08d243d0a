"""Gathers messages on the accelerator with NCCL. Not yet run on several GPUs."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.errors import DesynchronizedError, RankLostError
from picardopt.interrupts import interrupts_allowed
from picardopt.ranks import RankGroup
from picardopt.transport.base import REMEDY, Payload


class CollectiveTransport:
    """Gathers on the accelerator (NCCL).

    Args:
        device: This rank's accelerator.
        timeout: Seconds to wait for the slowest rank.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self.device, self.timeout = device, timeout
        self._broken = False

    def all_gather(
        self, message: Tensor, out: Tensor, ranks: RankGroup, payload: Payload | None = None
    ) -> None:
        """See `Transport.all_gather`; a payload leaves after the check, since NCCL needs equal lengths."""
        self._gather(message, out, ranks)
        if payload is not None:
            payload.check()
            self._gather(payload.message, payload.out, ranks)

    def _gather(self, message: Tensor, out: Tensor, ranks: RankGroup) -> None:
        if self._broken:
            raise DesynchronizedError(f"an earlier exchange was interrupted: {REMEDY}")
        if ranks.size == 1:
            out[0].copy_(message)
            return
        self._broken = True
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        in_order = list(ranks.peers) == sorted(ranks.peers)
        into = out if in_order else torch.empty_like(out)
        try:
            work = gather(into.view(-1), message.contiguous(), group=ranks.group, async_op=True)
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
            out.copy_(into[list(ranks.peers)])
        self._broken = False
