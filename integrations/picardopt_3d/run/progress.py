"""What can be seen of a stage while it runs: a bar, pictures, TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.export.pictures import rows_of, save_png, tile
from picardopt_3d.problem import Losses
from picardopt_3d.rendering import render_in_parts
from picardopt_3d.run.curves import WandbCurves
from picardopt_3d.run.drifts import group_names
from picardopt_3d.run.record import Recorder
from picardopt_3d.scenes import Scene

_RECENT = 20
_PIXELS = 64  # along an edge of each view of a progress picture


class Progress:
    """Shows each step of a stage; a context manager, since it closes the bar and the curves.

    Args:
        recorder: Of the stage.
        title: Beside the bar.
        steps: Of the whole stage.
        picture_every: Steps between pictures; 0: none.
        picture: Writes a picture of the scene after a step, and returns its path.
        tensorboard: Folder for TensorBoard's events; None: none are written.
        first_step: Steps of the run before this stage, for curves.
        curves: Where curves go besides; None: nowhere.
    """

    def __init__(
        self,
        recorder: Recorder,
        title: str,
        steps: int,
        picture_every: int,
        picture: Callable[[int], Path],
        tensorboard: Path | None = None,
        first_step: int = 0,
        curves: WandbCurves | None = None,
    ) -> None:
        self.recorder, self.first_step = recorder, first_step
        self.picture_every, self.picture = picture_every, picture
        done = recorder.record.step
        self.bar = tqdm(total=steps, initial=done, desc=title, unit="step")
        self.writers: list[Any] = [] if curves is None else [curves]
        if tensorboard is not None:
            self.writers.append(_writer(tensorboard, first_step + done))

    def __enter__(self) -> Progress:
        """Does nothing: the bar and the writers are open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        for writer in self.writers:
            writer.close()

    def step(self, step: int, losses: Losses) -> None:
        """Shows a step that has become final."""
        recent, stats = self.recorder.record.losses[-_RECENT:], self.recorder.stats
        shown = {"loss": f"{sum(recent) / len(recent):.3g}"}
        if stats.sweeps:
            shown["stride"] = str(stats.records[-1].stride)
            shown["steps/sweep"] = f"{stats.mean_stride:.2f}"
        if stats.drift_error:
            largest = max(stats.drift_error)
            shown["drift error"] = "<1%" if largest < 0.01 else f"{largest:.0%}"
        shown |= {name: str(count) for name, count in self._counts()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        path = None
        if self.picture_every and (step + 1) % self.picture_every == 0:
            path = self.picture(step)
        if self.writers:
            self._log(self.first_step + step, losses, path)

    def _counts(self) -> list[tuple[str, int]]:
        """How many parts the scene has now, by kind."""
        return [(name, history[-1][-1]) for name, history in self.recorder.record.counts.items()]

    def _log(self, step: int, losses: Losses, picture: Path | None) -> None:
        values: dict[str, Tensor] = {"loss": losses.total} | losses.terms
        for name, value in values.items():
            self._add(f"loss/{name}", float(value), step)
        stats = self.recorder.stats
        if stats.sweeps:
            self._add("picard/stride", stats.records[-1].stride, step)
            self._add("picard/steps_per_sweep", stats.mean_stride, step)
        names = group_names(self.recorder.problem.measured())
        for kind, shares in (("error", stats.drift_error), ("noise", stats.drift_noise)):
            for name, share in zip(names, shares, strict=False):
                self._add(f"drift_{kind}/{name}", share, step)
        for name, count in self._counts():
            self._add(f"counts/{name}", count, step)
        if picture is not None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            for writer in self.writers:
                writer.add_image("scene", pixels, step, dataformats="HWC")

    def _add(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        for writer in self.writers:
            writer.add_scalar(name, value, step)


def save_progress_picture(scene: Scene, path: Path, step: int, view: tuple[float, float]) -> None:
    """Writes four views around the scene: colour, normals and opacity, a row each.

    Args:
        scene: What to show.
        path: The PNG to write.
        step: Step of the run.
        view: Distance of the camera and its field of view, degrees.
    """
    cameras = turntable_cameras(4, distance=view[0], fov=view[1])
    (render,) = render_in_parts(scene, cameras, _PIXELS, normals=True, step=step, at_once=4)
    save_png(tile(rows_of(render), scale=2), path)


def _writer(folder: Path, step: int) -> Any:
    """Opens TensorBoard's writer; what an interrupted run wrote beyond a step is purged."""
    # Here, not above: most runs do without, and it takes a second to import.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step or None)
