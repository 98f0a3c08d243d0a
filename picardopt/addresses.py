"""Finds out before gloo connects hosts whether it would listen where only one of them can reach it.

Gloo listens at the address of the interface in GLOO_SOCKET_IFNAME, else at what the host's own name resolves to. Where
that is 127.0.1.1 (/etc/hosts of Debian), or nothing, it takes the loopback device, and its later errors name neither
the host nor the remedy.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOPBACK = "127.0.0.1"  # what gloo falls back to
_NAMED = "named"


def check_addresses(store: Store, environment: Mapping[str, str]) -> None:
    """Compares the hosts that torchrun joined; does nothing on one host.

    Args:
        store: Of this attempt's processes.
        environment: The variables that torchrun set.

    Raises:
        RuntimeError: If gloo would listen on the loopback device of one of several hosts; on all of them.
    """
    hosts = int(environment.get("GROUP_WORLD_SIZE", "1"))
    if hosts == 1:
        return
    if environment.get("LOCAL_RANK") == "0":
        mine = [socket.gethostname(), _gloo_address(environment), *_interfaces()]
        store.set(f"host/{environment['GROUP_RANK']}", " ".join(mine))
    answers = store.multi_get([f"host/{host}" for host in range(hosts)])
    told = sorted({tuple(answer.decode().split()) for answer in answers})
    if len({name for name, *_ in told}) == 1:
        return
    wrong = [
        f"{name} at {address} (it has the interfaces {', '.join(interfaces)})"
        for name, address, *interfaces in told
        if address != _NAMED and ipaddress.ip_address(address).is_loopback
    ]
    if wrong:
        raise RuntimeError(
            f"gloo would listen where no other host can reach it: {'; '.join(wrong)}. Name the interface that joins "
            "the hosts on each of them (export GLOO_SOCKET_IFNAME=...), or let each host's own name resolve to its "
            "address there (/etc/hosts)"
        )


def _gloo_address(environment: Mapping[str, str]) -> str:
    """Returns the address at which gloo will listen, or "named" if an interface is."""
    if environment.get("GLOO_SOCKET_IFNAME"):
        return _NAMED
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return str(address[0]).partition("%")[0]
    return _LOOPBACK


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name != "lo"]
