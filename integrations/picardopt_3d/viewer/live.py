"""The viewer of a run while it runs: the first worker serves it, between steps."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import yaml

from picardopt_3d.config import RunConfig
from picardopt_3d.config_files import plain
from picardopt_3d.run.agreement import agreed
from picardopt_3d.run.observer import Observer
from picardopt_3d.run.prepare import PreparedStage
from picardopt_3d.run.record import Recorder
from picardopt_3d.viewer.display import Display
from picardopt_3d.viewer.panel import Controls, Panel, lines_of
from picardopt_3d.viewer.pauses import Pauses, shared_store
from picardopt_3d.viewer.server import serving

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store
    from viser import ViserServer

_LOOK = 0.02
"""Seconds between two looks at the clients of a run that stands still."""
_FIGURES = 1.0
"""Seconds between two updates of the figures, at least; and fifty times what one takes."""


@contextlib.contextmanager
def live_viewer(config: RunConfig[Any]) -> Iterator[Observer]:
    """Yields the observer that serves a run; on other workers than the first one that which pauses with it.

    Args:
        config: The run's options.

    Raises:
        ValueError, OSError: There is no such address, or no viser; on all ranks alike.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        with agreed():
            if first:
                server = stack.enter_context(serving(config.viewer_host, config.viewer_port))
        store = shared_store()
        if not first:
            yield PausingWorker(store)
            return
        viewer = LiveViewer(server, store, config)
        stack.callback(viewer.close)
        yield viewer


class PausingWorker(Observer):
    """Pauses with the first worker.

    Args:
        store: Of the workers.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._pauses: Pauses | None = None

    def begin(
        self, prepared: PreparedStage, recorder: Recorder, save: Callable[[], None] | None
    ) -> None:
        """Pauses in this stage from now on."""
        self._pauses = Pauses(self._store, prepared.index, prepared.optimizer.window)

    def stepped(self, step: int) -> None:
        """Waits while the first worker pauses after this step."""
        if self._pauses is not None:
            self._pauses.join(step + 1)


class LiveViewer(Observer):
    """Serves the clients of a run between its steps.

    It renders the live parameters, which are those of the last step then, without gradients.

    Args:
        server: The server.
        store: Of the workers; None: there is one.
        config: The run's options.

    Attributes:
        controls: What the clients ask for.
    """

    def __init__(self, server: ViserServer, store: Store | None, config: RunConfig[Any]) -> None:
        self._store = store
        self._pauses: Pauses | None = None
        self._stages = [each.name for each in config.recipe.stages()]
        self.controls, self._display = Controls(), Display(server)
        settings = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        self._panel = Panel(server, config.task.title, settings, self.controls)
        self._server, self._next_figures = server, 0.0

    def begin(
        self, prepared: PreparedStage, recorder: Recorder, save: Callable[[], None] | None
    ) -> None:
        """Shows this stage from now on."""
        self._prepared, self._recorder, self._save = prepared, recorder, save
        self._pauses = Pauses(self._store, prepared.index, prepared.optimizer.window)
        if prepared.index == 0 or self._display.scene is None:
            self._display.look_from(*prepared.config.cameras.middle)
        self._display.show(prepared.problem.scene, recorder.record.step)

    def stepped(self, step: int) -> None:
        """Serves the clients, for as long as they want the run to pause."""
        self._display.show(self._prepared.problem.scene, step)
        self._serve("running")
        if self._pauses is None:
            return
        if not self.controls.paused.is_set():
            self._pauses.end()
        elif self._pauses.begins(step + 1):
            self._pause(self._pauses, step)

    def close(self) -> None:
        """Lets no worker wait for an end of a pause that will not come."""
        if self._pauses is not None:
            self._pauses.end()

    def _pause(self, pauses: Pauses, step: int) -> None:
        self._next_figures = 0.0
        print(f"\nviewer: paused after step {step + 1}", file=sys.stderr)
        try:
            while self.controls.paused.is_set():
                begun = time.time()
                self._serve(f"paused after step {step + 1}")
                time.sleep(_LOOK)
                self._recorder.leave_out(time.time() - begun)
        finally:
            pauses.end()
            self._next_figures = 0.0

    def _serve(self, state: str) -> None:
        """Does what the clients wait for."""
        self._display.serve()
        if self.controls.save.is_set() and self._save is not None:
            self.controls.save.clear()
            self._save()
            for client in self._server.get_clients().values():
                said = f"after step {self._recorder.record.step}"
                client.add_notification("Checkpoint saved", said, auto_close_seconds=5.0)
        begun = time.time()
        if begun >= self._next_figures and self._server.get_clients():
            self._recorder.count()
            record = self._recorder.record
            if len(self._stages) > 1:
                index = self._prepared.index
                state = f"{state}, {self._stages[index]} ({index + 1}/{len(self._stages)})"
            self._panel.say(lines_of(record, state))
            self._panel.plot(record)
            ended = time.time()
            self._next_figures = ended + max(_FIGURES, 50 * (ended - begun))
