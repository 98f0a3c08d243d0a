"""The interface of transports: every rank sends every rank a message of the same length."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from picardopt.ranks import RankGroup

REMEDY = "restart the job and resume from its last checkpoint"


class Transport(Protocol):
    """Carries messages between ranks."""

    device: torch.device
    """The device of messages."""
    timeout: float
    """Seconds to wait for any rank."""

    def all_gather(self, message: Tensor, out: Tensor, ranks: RankGroup) -> None:
        """Gathers the message of every rank of a group.

        Args:
            message: uint8 tensor [n], the same n on every rank.
            out: uint8 tensor [ranks, n]; row r becomes the message of the group's rank r.
            ranks: The group; all its ranks must make this call.

        Raises:
            RankLostError: If a rank died or did not answer within the timeout.
            DesynchronizedError: If an earlier exchange was interrupted.
        """
        ...
