"""The interface of transports: every rank sends every rank a message of the same length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from picardopt.ranks import RankGroup

REMEDY = "restart the job and resume from its last checkpoint"


@dataclass(frozen=True)
class Payload:
    """A second message of an exchange, to be used only if the first ones pass a check.

    Attributes:
        message: uint8 tensor [n].
        out: uint8 tensor [ranks, n]; row r becomes the payload of the group's rank r. It may be written to before the
            check, but no more is received than it holds, even where another rank's payload has another length.
        check: Called when the first messages have arrived, maybe in a thread; the exchange raises its error.
    """

    message: Tensor
    out: Tensor
    check: Callable[[], object]


class Transport(Protocol):
    """Carries messages between ranks."""

    device: torch.device
    """The device of messages."""
    timeout: float
    """Seconds to wait for any rank."""

    def all_gather(
        self, message: Tensor, out: Tensor, ranks: RankGroup, payload: Payload | None = None
    ) -> None:
        """Gathers the message of every rank of a group.

        Args:
            message: uint8 tensor [n], the same n on every rank.
            out: uint8 tensor [ranks, n]; row r becomes the message of the group's rank r.
            ranks: The group; all its ranks must make this call.
            payload: What each of them sends besides; its length may differ by rank only where the check fails on all.

        Raises:
            RankLostError: If a rank died or did not answer within the timeout.
            DesynchronizedError: If an earlier exchange was interrupted.
        """
        ...
