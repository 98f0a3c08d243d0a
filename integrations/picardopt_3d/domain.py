"""The old name of `world`."""

from picardopt_3d.world import *  # noqa: F403
