"""The web server of a viewer: viser's, at one address, with nothing that reaches further."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import random
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viser import ViserServer

LOOPBACK = "127.0.0.1"
PORT = 8080


def check_viewer(host: str, port: int) -> None:
    """Checks what a viewer needs before there is one.

    Args:
        host: Where it is to listen.
        port: Likewise; 0: any that is free.

    Raises:
        ValueError: The port is none, or viser is not installed.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"viewer_port={port}: give a number from 0 (any free port) to 65535")
    if not host:
        raise ValueError(
            f"viewer_host is empty: give an address of this machine, such as {LOOPBACK}"
        )
    if importlib.util.find_spec("viser") is None:
        raise ValueError(
            "the viewer needs viser, which is not installed: pip install 'picardopt-3d[viewer]'"
        )


@contextlib.contextmanager
def serving(host: str, port: int) -> Iterator[ViserServer]:
    """Serves a page while the block runs, and prints its address.

    Args:
        host: Where to listen.
        port: Likewise; 0: any that is free.

    Raises:
        ValueError: viser is not installed.
        OSError: The address cannot be had.
    """
    check_viewer(host, port)
    _check_address(host, port)
    server = _start(host, port)
    try:
        if port not in (0, server.get_port()):  # taken in between: it goes on to the next one
            raise OSError(_taken(host, port))
        _close_tunnel(server)
        server.gui.configure_theme(show_logo=False, show_share_button=False)
        print(f"viewer: {address(host, server.get_port())}", file=sys.stderr, flush=True)
        yield server
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            server.stop()


def _start(host: str, port: int) -> ViserServer:
    """Starts a server, and draws no random number of the program's."""
    from picardopt.rng import preserved_rng

    with preserved_rng(), contextlib.redirect_stdout(io.StringIO()):  # it prints a box
        # Here, not above: it is optional, and takes most of a second to import.
        import viser

        _keep_pings_apart()
        # A client may leave while its picture is made.
        warnings.filterwarnings("ignore", "Queued a .* on a closed connection", UserWarning)
        return viser.ViserServer(host, port, "picardopt", verbose=False)


def address(host: str, port: int) -> str:
    """Returns the page's address, for a browser."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _check_address(host: str, port: int) -> None:
    """Checks that a server can listen there: viser would try the next thousand ports, or wait for ever.

    Raises:
        OSError: It cannot.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(_no_such(host, error)) from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(where)
        except PermissionError as error:
            raise PermissionError(
                f"--viewer-port {port}: {error.strerror}; give a port from 1024 on"
            ) from error
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise OSError(_taken(host, port) if taken else _no_such(host, error)) from error


def _taken(host: str, port: int) -> str:
    return f"--viewer-port {port}: {host}:{port} is in use by another program; give another port, or 0 for any free one"


def _no_such(host: str, error: OSError) -> str:
    return f"--viewer-host {host}: {error.strerror or error}; give an address of this machine, such as {LOOPBACK}"


def _keep_pings_apart() -> None:
    """Gives the pings of the server's thread a generator of their own: steps draw from Python's global one."""
    from websockets.asyncio import connection

    module: Any = connection
    module.random = random.Random()


def _close_tunnel(server: ViserServer) -> None:
    """Takes away what would publish the page through a server on the internet, if a client asked for it."""
    from viser import _messages

    server._websock_server.unregister_handler(_messages.ShareUrlRequest)
