"""What all that look for the surface of another scene share."""

from __future__ import annotations

POINTS_AT_ONCE = 1 << 17
"""Points that are evaluated in one call, to limit memory."""

FAINT = 0.05
"""A scene in which no ray is more opaque than this is empty."""


class NoSurfaceError(ValueError):
    """The scene has no surface, or none at the requested level."""


def empty_scene() -> NoSurfaceError:
    """Returns the error of a scene that is empty where a mesh should be made of it."""
    return NoSurfaceError(
        "the scene before is empty: hardly anything in it is opaque, so that there is no surface to start from. "
        "It is kept as it is; give its stage more steps, another seed or weaker sparsity weights"
    )
