"""What a transport is: every rank gives every rank one equally long message."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from picardopt.ranks import RankGroup

REMEDY = "restart the job and resume from its last checkpoint"


class Transport(Protocol):
    """Carries messages between ranks."""

    device: torch.device
    """Where messages must lie."""
    timeout: float
    """Seconds to wait for any rank."""

    def all_gather(self, message: Tensor, out: Tensor, ranks: RankGroup) -> None:
        """Gathers the message of every rank of a group.

        Args:
            message: uint8 tensor [n], the same n on every rank.
            out: uint8 tensor [ranks, n]; row r becomes the message of the group's rank r.
            ranks: The ranks that all make this call now.

        Raises:
            RankLostError: If a rank died or did not answer within the timeout.
            DesynchronizedError: If an earlier exchange was cut off.
        """
        ...
