"""Who may look at a run between its steps: nobody, unless a viewer is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from picardopt_3d.config import RunConfig
from picardopt_3d.run.prepare import PreparedStage
from picardopt_3d.run.record import Recorder


class Observer:
    """Looks at a run, on every worker and by the thread that trains; this one looks at nothing.

    It must leave the run as it is: parameters, gradients, optimizers and global random generators.
    """

    def begin(
        self, prepared: PreparedStage, recorder: Recorder, save: Callable[[], None] | None
    ) -> None:
        """Looks at a stage from now on.

        Args:
            prepared: The stage.
            recorder: Of the stage.
            save: Writes a checkpoint of the last step; None on all workers but the first.
        """

    def stepped(self, step: int) -> None:
        """Looks at the stage after a step that is final, with nothing half done; the next one waits for this."""


@contextlib.contextmanager
def observing(config: RunConfig[Any]) -> Iterator[Observer]:
    """Yields the observer of a run; every worker calls this.

    Args:
        config: The run's options.

    Raises:
        ValueError, OSError: What was asked for cannot be had; on all ranks alike.
    """
    if not config.viewer:
        yield Observer()
        return
    # Here, not above: most runs do without.
    from picardopt_3d.viewer.live import live_viewer

    with live_viewer(config) as observer:
        yield observer
