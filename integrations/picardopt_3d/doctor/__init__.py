"""The command `picardopt doctor`."""

from picardopt_3d.doctor.command import main

__all__ = ["main"]
