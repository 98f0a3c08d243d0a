"""What is to be seen of a run while it runs: a bar, pictures, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from .problem import Losses
from .record import Recorder
from .scenes import Scene

_RECENT = 20


class Progress:
    """Shows each step of a run.

    Args:
        bar: tqdm's.
        recorder: of the run.
        picture_every: steps between pictures; 0: none.
        picture: writes a picture of the scene after a step, and tells where.
        tensorboard: folder for TensorBoard's events; None: none are written.
    """

    def __init__(
        self,
        bar: Any,
        recorder: Recorder,
        picture_every: int,
        picture: Callable[[Scene, int], Path],
        tensorboard: Path | None,
    ) -> None:
        self.bar, self.recorder = bar, recorder
        self.picture_every, self.picture = picture_every, picture
        self.writer: Any = (
            None if tensorboard is None else _writer(tensorboard, recorder.trained.step)
        )

    def __enter__(self) -> Progress:
        """Nothing to be done: the bar and the writer are open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, values: Losses, scene: Scene) -> None:
        """Show a step that has become final."""
        recent = self.recorder.trained.losses[-_RECENT:]
        shown = {"loss": f"{sum(recent) / len(recent):.3g}"}
        stats = self.recorder.stats
        if stats is not None and stats.strides:
            shown["stride"] = str(stats.strides[-1])
            shown["steps/sweep"] = f"{stats.mean_stride:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        path = None
        if self.picture_every and (step + 1) % self.picture_every == 0:
            path = self.picture(scene, step)
        if self.writer is not None:
            self._log(step, values, path)

    def _log(self, step: int, values: Losses, picture: Path | None) -> None:
        for name, value in ({"loss": values.total} | values.terms).items():
            self.writer.add_scalar(f"loss/{name}", float(value), step)
        stats = self.recorder.stats
        if stats is not None and stats.strides:
            self.writer.add_scalar("picard/stride", stats.strides[-1], step)
            self.writer.add_scalar("picard/steps_per_sweep", stats.mean_stride, step)
        if picture is not None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            self.writer.add_image("scene", pixels, step, dataformats="HWC")


def _writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer; what an interrupted run wrote beyond a step is purged."""
    # Here, not above: most runs do without, and it takes a second to import.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step or None)
