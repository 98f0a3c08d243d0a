"""Where a scene is looked at from, to make a mesh of it."""

from __future__ import annotations

import math

import torch

from picardopt_3d.cameras import Cameras, orbit_cameras

_MARGIN = 1.1  # of the cameras' distance, so that no silhouette touches the edge of a view
_RINGS = ((-60.0, 6), (-30.0, 8), (0.0, 10), (30.0, 8), (60.0, 6))
_POLES = (89.9, -89.9)

VIEWS = sum(count for _, count in _RINGS) + len(_POLES)
"""Number of views."""


def views_around(reach: float, distance: float | None = None, fov: float = 42.5) -> Cameras:
    """Returns cameras all around the origin.

    Args:
        reach: Radius of the ball about the origin that they should see whole, world units.
        distance: Distance from the origin, world units; None: as near as the ball allows.
        fov: Vertical field of view, degrees.
    """
    rings = [(elevation, i, count) for elevation, count in _RINGS for i in range(count)]
    elevations = [elevation for elevation, _, _ in rings] + list(_POLES)
    # Neighbouring rings are turned against each other.
    azimuths = [360 * (i + (0.5 if abs(e) == 30 else 0.0)) / count for e, i, count in rings]
    azimuths += [0.0] * len(_POLES)
    if distance is None:
        distance = _MARGIN * reach / math.sin(math.radians(fov / 2))
    return orbit_cameras(torch.tensor(elevations), torch.tensor(azimuths), distance, fov)
