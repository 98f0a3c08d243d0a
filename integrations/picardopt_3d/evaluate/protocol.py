"""How pictures of a run are taken to judge it: as in the paper, 120 azimuths at 12 degrees of elevation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from picardopt_3d.cameras import Cameras, turntable_cameras

USUAL_SIZE = 64
"""Pixels of the pictures of a run whose report does not say."""

USUAL_VIEW = (1.65, 42.5)
"""Distance and vertical field of view (degrees) of its cameras: the built-in world's."""


@dataclass(frozen=True)
class Protocol:
    """The views that a run is judged by.

    Attributes:
        views: Azimuths, evenly around.
        elevation: Degrees above the horizon.
        distance: From the origin, scene units; None: in the middle of where the run was trained to look from.
        fov: Vertical field of view, degrees; None: the same.
        size: Pixels along each edge; None: those of the run's own final views.
        background: Behind the object: "white", so that objects are judged and not what is behind them, or the
            "scene"'s own.
        device: Where scenes are rendered.
    """

    views: int = 120
    elevation: float = 12.0
    distance: float | None = None
    fov: float | None = None
    size: int | None = None
    background: Literal["white", "scene"] = "white"
    device: str = "auto"

    def cameras(self, view: tuple[float, float] | None = None) -> Cameras:
        """Returns the cameras.

        Args:
            view: Distance and field of view of a run; None: those of the built-in world.
        """
        usual = view or USUAL_VIEW
        distance, fov = (
            own if given is None else given
            for given, own in zip((self.distance, self.fov), usual, strict=True)
        )
        return turntable_cameras(self.views, self.elevation, distance, fov)
