"""Serves a run's folder, and what is written to it meanwhile."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from picardopt import CheckpointError
from picardopt_3d.viewer.display import Display
from picardopt_3d.viewer.follow import FollowedRun, Found
from picardopt_3d.viewer.panel import Panel, lines_of
from picardopt_3d.viewer.server import serving

_LOOK = 1.0
"""Seconds between two looks at the folder."""
_SERVE = 0.02
"""Seconds between two looks at the clients."""


def view(run: Path, host: str, port: int, device: str = "auto") -> None:
    """Serves a run's folder for ever.

    Args:
        run: The folder.
        host: Where the page is served.
        port: Likewise; 0: any that is free.
        device: As `pick_device` takes it.

    Raises:
        ValueError, OSError: The folder or the address cannot be used.
    """
    followed = FollowedRun(run, device)
    config, found = followed.config, _looked(followed)
    settings = followed.folder.config.read_text()
    with serving(host, port) as server:
        display = Display(server)
        display.look_from(*config.recipe.stages()[0].config.cameras.middle)
        panel = Panel(server, config.task.title, settings, None)
        panel.say([("state", "nothing is written yet: waiting for the first checkpoint")])
        due, said = time.monotonic() + _LOOK, ""
        _show(found, display, panel)
        while True:
            if time.monotonic() >= due:
                try:
                    _show(_looked(followed), display, panel)
                except (ValueError, OSError) as error:
                    if str(error) != said:  # the run goes on, and may write a better one
                        said = str(error)
                        print(f"viewer: {error}", file=sys.stderr)
                due = time.monotonic() + _LOOK
            display.serve()
            time.sleep(_SERVE)


def _looked(followed: FollowedRun) -> Found:
    """Looks at the folder; errors are all a user's."""
    try:
        return followed.look()
    except (CheckpointError, RuntimeError, KeyError) as error:
        raise ValueError(f"{followed.folder.path} cannot be shown: {error}") from error


def _show(found: Found, display: Display, panel: Panel) -> None:
    """Shows what a look has found."""
    if found.scene is not None:
        display.show(found.scene)
    if found.record is not None:
        done = found.record.step >= found.record.figures.get("steps", 0)
        stage = f", {found.stage}" if found.stage else ""
        panel.say(lines_of(found.record, ("finished" if done else "last checkpoint") + stage))
        panel.plot(found.record)
    if found.picture is not None:
        panel.picture(found.picture)
