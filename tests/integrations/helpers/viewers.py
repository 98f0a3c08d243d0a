"""The browser's end of a viewer: viser's own messages over a websocket, without a browser."""

from __future__ import annotations

import _thread
import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import viser
import zstandard
from picardopt_3d.viewer.server import LOOPBACK
from viser import _messages
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PATIENCE = 60.0
"""Seconds to wait for anything."""


def free_port() -> int:
    """A port of the loopback address that nothing listens at."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class Client:
    """A client of a viewer; a thread receives what it is sent.

    Args:
        port: Where the viewer listens, now or soon.

    Attributes:
        received: All messages, as dictionaries.
    """

    def __init__(self, port: int) -> None:
        self.received: list[dict[str, Any]] = []
        protocol: Any = f"viser-v{viser.__version__}"
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection = connect(
                    f"ws://{LOOPBACK}:{port}",
                    subprotocols=[protocol],
                    compression=None,
                    max_size=None,
                    ping_interval=None,
                )
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        self.look_from(0.0)

    def close(self) -> None:
        """Leaves."""
        self._connection.close()
        self._thread.join(PATIENCE)

    def _receive(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            for content in self._connection:
                assert isinstance(content, bytes)
                self._take(content)

    def _take(self, content: bytes) -> None:
        _, packed = struct.unpack("<QQ", content[:16])
        text = zstandard.ZstdDecompressor().decompress(content[16 : 16 + packed])
        found = msgspec.msgpack.decode(text)
        self.received += found["messages"]

    def _send(self, message: _messages.Message) -> bool:
        """Sends a message; returns whether the viewer is still there."""
        try:
            self._connection.send(msgspec.msgpack.encode(message.as_serializable_dict()))
        except ConnectionClosed:
            return False
        return True

    def ask_for_a_public_address(self) -> None:
        """Does what the button does that the page does not show."""
        self._send(_messages.ShareUrlRequest())

    def look_from(self, azimuth: float, distance: float = 2.0) -> bool:
        """Moves the camera to an azimuth, degrees, at the height of the origin; returns whether the viewer is there."""
        around = math.radians(azimuth)
        backward = np.array([math.cos(around), math.sin(around), 0.0])
        axes = np.stack([[-math.sin(around), math.cos(around), 0], [0, 0, -1], -backward], axis=1)
        return self._send(
            _messages.ViewerCameraMessage(
                wxyz=tuple(viser.transforms.SO3.from_matrix(axes).wxyz.tolist()),
                position=tuple((distance * backward).tolist()),
                fov=math.radians(40.0),
                near=0.01,
                far=100.0,
                image_height=48,
                image_width=64,
                look_at=(0.0, 0.0, 0.0),
                up_direction=(0.0, 0.0, 1.0),
            )
        )

    def click(self, label: str) -> None:
        """Presses a button, once it is there."""
        button = self.wait_for(
            lambda: next(
                (m["uuid"] for m in self.of("GuiButtonMessage") if m["props"]["label"] == label),
                None,
            )
        )
        self._send(_messages.GuiUpdateMessage(button, {"value": True}))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a kind."""
        return [message for message in list(self.received) if message["type"] == kind]

    def pictures(self) -> list[bytes]:
        """The pictures of the scene, as files."""
        found = [message["rgb_data"] for message in self.of("BackgroundImageMessage")]
        return [content for content in found if content is not None]

    def texts(self) -> list[str]:
        """All states of the table of figures, and other texts."""
        new = [m["props"]["content"] for m in self.of("GuiHtmlMessage")]
        changed = [m["updates"].get("content", "") for m in self.of("GuiUpdateMessage")]
        return new + changed

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Waits until something is true, and returns it."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, [m["type"] for m in self.received]
            time.sleep(0.01)
        return found


@contextlib.contextmanager
def beside(port: int, act: Callable[[Client], None]) -> Iterator[list[Client]]:
    """Lets a client act in a thread while the block runs, and yields a list that it is put into."""
    errors: list[BaseException] = []
    clients: list[Client] = []

    def run() -> None:
        try:
            clients.append(Client(port))
            act(clients[0])
        except BaseException as error:
            errors.append(error)
            _thread.interrupt_main()  # a run that is paused would never end

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield clients
        thread.join(PATIENCE)
    finally:
        if errors:
            raise errors[0]
    assert not thread.is_alive()
    clients[0].close()
