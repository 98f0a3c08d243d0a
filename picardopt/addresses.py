"""Finds out before gloo connects several hosts whether it would look for one of them where only that one is.

Gloo listens at the address of the interface in GLOO_SOCKET_IFNAME, else at what the host's own name resolves to. Where
that is 127.0.1.1 (/etc/hosts of Debian), or nothing, it takes the loopback device, and its later errors name neither
the host nor the remedy.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOPBACK = "127.0.0.1"  # what gloo falls back to
_UNKNOWN = "?"
_SIOCGIFADDR = 0x8915


def check_addresses(store: Store, environment: Mapping[str, str]) -> None:
    """Compares the addresses of the hosts that torchrun joined; does nothing on one host.

    Args:
        store: Of this attempt's processes.
        environment: The variables that torchrun set.

    Raises:
        RuntimeError: If a host would be looked for on the loopback device of another one; on all of them.
    """
    hosts = int(environment.get("GROUP_WORLD_SIZE", "1"))
    if hosts == 1:
        return
    if environment.get("LOCAL_RANK") == "0":
        interfaces = [name for _, name in socket.if_nameindex() if name != "lo"]
        mine = [socket.gethostname(), _gloo_address(environment), *interfaces]
        store.set(f"host/{environment['GROUP_RANK']}", " ".join(mine))
    answers = store.multi_get([f"host/{host}" for host in range(hosts)])
    told = {tuple(answer.decode().split()) for answer in answers}
    known = {name: ip_address(at) for name, at, *_ in told if at != _UNKNOWN}
    wrong = [
        f"{name} at {address} (it has the interfaces {', '.join(interfaces)})"
        for name, address, *interfaces in sorted(told)
        if any(_misses(known[other], known.get(name)) for other in known.keys() - {name})
    ]
    if wrong:
        raise RuntimeError(
            f"gloo would look for {' and '.join(wrong)}, where no other host finds it. Name the interface that joins "
            "the hosts on each of them (export GLOO_SOCKET_IFNAME=...), or let each host's own name resolve to its "
            "address there (/etc/hosts)"
        )


def _misses(mine: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address | None) -> bool:
    """Returns whether a host connects to the loopback address of another one: of two, the higher address connects."""
    if other is None or not other.is_loopback or mine.version != other.version:
        return False
    return int(mine) >= int(other)


def _gloo_address(environment: Mapping[str, str]) -> str:
    """Returns the address at which gloo will listen on this host."""
    interface = environment.get("GLOO_SOCKET_IFNAME")
    try:
        if interface:
            request = struct.pack("256s", interface.partition(",")[0].encode()[:15])
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        name = socket.gethostname()
        for family, kind, _, _, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return str(address[0]).partition("%")[0]
    except OSError:
        pass
    return _UNKNOWN if interface else _LOOPBACK
