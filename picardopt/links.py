"""What joins devices, and how long messages take over it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What joins the devices.

    Attributes:
        name: What it is called in tables.
        bandwidth: Bytes a second that a device sends while it receives as many.
        latency: Seconds of one collective message, however short.
        source: Where the numbers are from.
    """

    name: str
    bandwidth: float
    latency: float
    source: str


NVLINK = Link("NVLink", 450e9, 20e-6, "H100 SXM: 900 GB/s both ways together; latency assumed")
PCIE = Link("PCIe", 64e9, 30e-6, "PCIe 5.0 x16: 128 GB/s both ways together; latency assumed")
ETHERNET = Link("25 Gb/s", 25e9 / 8, 60e-6, "25 Gb/s Ethernet, nominal; latency assumed")
LOOPBACK = Link(
    "loopback", 0.8e9, 1.4e-3, "gloo, two processes of one host: benchmarks/plan_check.py"
)
LINKS = {"nvlink": NVLINK, "pcie": PCIE, "ethernet": ETHERNET, "loopback": LOOPBACK}


def all_gather(link: Link, ranks: int, size: int) -> float:
    """Returns the seconds in which every rank receives `size` bytes from every other one."""
    return link.latency + (ranks - 1) * size / link.bandwidth if ranks > 1 else 0.0


def all_reduce(link: Link, ranks: int, size: int) -> float:
    """Returns the seconds in which ranks add up `size` bytes, in a ring."""
    return link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth if ranks > 1 else 0.0
