"""Curves and pictures of a stage for Weights & Biases, by the calls that TensorBoard's writer has."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_PROJECT = "picardopt"


def check_wandb() -> None:
    """Checks that Weights & Biases is installed.

    Raises:
        ValueError: It is not.
    """
    try:
        metadata.version(
            "wandb"
        )  # a folder of this name, which it leaves behind, could be imported too
    except metadata.PackageNotFoundError:
        raise ValueError(
            'wandb=True: it is not installed; pip install "picardopt-3d[wandb]", or leave --wandb out'
        ) from None


class WandbCurves:
    """A run of Weights & Biases, which is a stage of ours; those of one folder are a group.

    Where it goes is what `WANDB_PROJECT`, `WANDB_MODE=offline` and the like say.

    Args:
        folder: For its files. It is made if need be, and keeps the group's name, under which a resumed run goes on.
        name: Of the stage.
        index: Of the stage, from 0.
        options: To be shown beside the curves.
    """

    def __init__(self, folder: Path, name: str, index: int, options: Mapping[str, Any]) -> None:
        # Here, not above: it is optional, and takes a second to import.
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "group.txt"
        if not kept.is_file():
            kept.write_text(secrets.token_hex(6))
        group = kept.read_text()
        self._library: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=str(folder.parent),
            name=name,
            id=f"{group}-{index + 1}",
            group=group,
            resume="allow",
            config=dict(options),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._row: dict[str, Any] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._add(name, float(value), step)

    def add_image(
        self, name: str, pixels: npt.NDArray[np.uint8], step: int, dataformats: str = "HWC"
    ) -> None:
        """Adds a picture, `[height, width, 3]`."""
        self._add(name, self._library.Image(pixels), step)

    def close(self) -> None:
        """Sends what is left, and ends the run."""
        self._send()
        self._run.finish()

    def _add(self, name: str, value: Any, step: int) -> None:
        """Adds an entry to the row of its step; rows go out whole."""
        if self._row.get("step", step) != step:
            self._send()
        self._row |= {"step": step, name: value}

    def _send(self) -> None:
        """Sends the row."""
        if self._row:
            self._run.log(self._row)
        self._row = {}
