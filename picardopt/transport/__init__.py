"""Exchanges bytes between ranks: point to point in host memory (gloo), or collectively on the accelerator (NCCL)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from picardopt.transport.base import Payload, Transport
from picardopt.transport.collective import CollectiveTransport
from picardopt.transport.pairwise import PairwiseTransport

__all__ = ["CollectiveTransport", "PairwiseTransport", "Payload", "Transport", "make_transport"]


def make_transport(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Transport:
    """Returns the transport for a group's backend on `device`; subgroups have the same backend."""
    backend = dist.get_backend_config(group) if device.type != "cpu" else ""
    if device.type != "cpu" and f"{device.type}:nccl" in str(backend):
        return CollectiveTransport(device, timeout)
    return PairwiseTransport(timeout)
