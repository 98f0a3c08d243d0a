"""When a client's picture is due, and at which size: coarse while its camera moves, fine when it rests."""

from __future__ import annotations

import math
from dataclasses import dataclass

RESTS = 0.25
"""Seconds without motion after which a camera rests."""

_SECONDS = {"coarse": 0.08, "fine": 0.5}
"""What a picture may take; its size follows from what the last ones took."""
_MOST = {"coarse": 256 * 256, "fine": 768 * 768}
_LEAST = 32 * 32
"""Pixels of a picture."""
_IDLE = {"moved": 1.0, "changed": 9.0}
"""Seconds without rendering after a picture, in those that it took: half of a run's time is its own while a camera
moves, nine tenths while only the scene changes."""


@dataclass
class Speed:
    """How fast a scene is rendered.

    Attributes:
        pixels: Pixels a second.
    """

    pixels: float = 64 * 64 / _SECONDS["coarse"]

    def learn(self, pixels: int, seconds: float) -> None:
        """Takes in what a picture took."""
        self.pixels = 0.5 * self.pixels + 0.5 * pixels / max(seconds, 1e-4)

    def size(self, kind: str, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width of a picture.

        Args:
            kind: "coarse" or "fine".
            height: Of the client's window, pixels.
            width: Likewise.
        """
        window = max(1, height) * max(1, width)
        pixels = min(self.pixels * _SECONDS[kind], _MOST[kind], window)
        scale = math.sqrt(max(pixels, _LEAST) / window)
        return max(8, round(height * scale)), max(8, round(width * scale))


@dataclass
class Shown:
    """What a client sees.

    Attributes:
        camera: When its camera moved last, as of the last picture, `time.time()`.
        scene: Number of the scene's state in that picture.
        kind: "coarse", "fine", or "" before the first one.
        at: When it was made.
        seconds: What it took.
    """

    camera: float = 0.0
    scene: int = -1
    kind: str = ""
    at: float = 0.0
    seconds: float = 0.0

    def due(self, now: float, camera: float, scene: int) -> str | None:
        """Returns the kind of picture to make now; None: none.

        Args:
            now: `time.time()`.
            camera: When the client's camera moved last.
            scene: Number of the scene's state.
        """
        moves = now - camera < RESTS
        if self.camera != camera or (self.kind != "fine" and not moves):
            idle = "moved"
        elif self.scene != scene and not moves:
            idle = "changed"
        else:
            return None
        if self.kind and now - self.at < _IDLE[idle] * self.seconds:
            return None
        return "coarse" if moves else "fine"
