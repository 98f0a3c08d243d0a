"""The pictures that a run is judged by: as in the paper, 120 azimuths at an elevation of 12 degrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from picardopt_3d.cameras import Cameras, turntable_cameras

USUAL_SIZE = 64
"""Pixels along each edge of the pictures of a run whose report does not say."""

USUAL_VIEW = (1.65, 42.5)
"""Distance (scene units) and vertical field of view (degrees) of the built-in world's cameras."""


@dataclass(frozen=True)
class Protocol:
    """The views that a run is judged by.

    Attributes:
        views: Number of azimuths, evenly around the object.
        elevation: Elevation above the horizon, degrees.
        distance: Distance from the origin, scene units; None: the middle of the run's training cameras.
        fov: Vertical field of view, degrees; None: the middle of the run's training cameras.
        size: Pixels along each edge; None: those of the run's own final views.
        background: "white", so that only the object is judged, or the "scene"'s own background.
        device: Device that renders the scenes.
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
            view: Distance (scene units) and field of view (degrees) of a run; None: those of the built-in world.
        """
        usual = view or USUAL_VIEW
        distance, fov = (
            own if given is None else given
            for given, own in zip((self.distance, self.fov), usual, strict=True)
        )
        return turntable_cameras(self.views, self.elevation, distance, fov)
