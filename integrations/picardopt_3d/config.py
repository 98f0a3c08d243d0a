"""The options of a run."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from typing_extensions import Self
from tyro.conf import Positional, arg

from picardopt_3d.methods import METHODS, RecipeConfig
from picardopt_3d.picard import Predictor
from picardopt_3d.run.curves import check_wandb
from picardopt_3d.run.folder import PLAN
from picardopt_3d.task import ImageTask, Task, TextTask
from picardopt_3d.tolerances import ToleranceOption, parse_tolerance
from picardopt_3d.viewer.server import LOOPBACK, PORT, check_viewer

R = TypeVar("R", bound=RecipeConfig)


def _method_help() -> str:
    """The help of `--method`, with the methods of each command."""
    listed = "; ".join(f"{command}: {', '.join(methods)}" for command, methods in METHODS.items())
    return f"The method ({listed})."


def _preset_help() -> str:
    """The help of `--preset`, with the presets that only some methods have."""
    others = {
        method: ", ".join(name for name in entry.presets if name not in ("small", "paper"))
        for methods in METHODS.values()
        for method, entry in methods.items()
    }
    also = "".join(f"; of {method} also {names}" for method, names in others.items() if names)
    return (
        "The method's numbers to begin with: small (minutes on two CPU cores with the models that ship), paper "
        f"(the published settings, with models of the hub){also}."
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(ABC, Generic[R]):
    """The options of every run; `TextTo3DConfig` and `ImageTo3DConfig` add what is asked for.

    `check` checks them, not the constructor: a command line is filled in bit by bit.

    Attributes:
        out: Folder for the run's files; made if absent, must be empty unless `overwrite`.
        method: The method, one that `METHODS` lists for the command.
        preset: The method's numbers to begin with: small (minutes on two CPU cores with the models that ship), paper
            (the published settings, with models of the hub), or another one that `METHODS` has.
        recipe: The numbers: batch, pixels, scene, losses, guidance, ...
        seed: Seed of the whole run: the same seed gives the same object.
        workers: Processes (one device each); None: one per accelerator, else two if the machine has two cores.
        window: Steps evaluated by one sweep; None: the recipe's, which by default is one per worker. Without `workers`
            and `window`, a preset that was timed on this kind of device takes what the planner recommends, and says so.
            A window wider than the number of workers lets the steps of a worker share calls of the guidance (unless the
            tolerance is 0), at the cost of memory.
        tolerance: Largest residual accepted: a number (0: exactly the sequential run, inf: everything),
            "step-relative[:FACTOR,DISTANCE]", "drift[:NOISE,DRIFT]" (how far a step's gradient may be off),
            "adaptive[:INITIAL,DECAY,STATISTIC]" (the paper's rule), or None: the recipe's.
        predictor: What fills new slots of the window; None: the recipe's.
        secants: Pairs of drifts that correct drifts at wrong guesses, 0: none; None: the recipe's, which by default is
            8 with a tolerance "drift", else 0.
        sequential: Evaluate nothing ahead: a window of 1 in one process.
        picture_every: Steps between progress pictures; 0: none.
        checkpoint_every: Steps between checkpoints; 0: only at the end and at Ctrl-C.
        tensorboard: Write losses, strides and pictures for TensorBoard as well.
        wandb: Send losses, strides and pictures to Weights & Biases as well, if it is installed.
        viewer: Show the growing scene, strides and losses in a browser while the run goes on; results do not change.
        viewer_host: Address of the viewer; by default only this machine can reach it. There is no password.
        viewer_port: Port of the viewer; 0: any that is free.
        threads: CPU threads per process; bits repeat only with the same number.
        device: "auto" (accelerators if there are any), "cpu" or "cuda".
        overwrite: Allow an `out` that holds files of an earlier run.
    """

    out: Path
    method: Annotated[str, arg(help=_method_help())]
    preset: Annotated[str, arg(help=_preset_help())]
    recipe: R
    seed: int = 0
    workers: int | None = None
    window: int | None = None
    tolerance: ToleranceOption = None
    predictor: Predictor | None = None
    secants: int | None = None
    sequential: bool = False
    picture_every: int = 100
    checkpoint_every: int = 500
    tensorboard: bool = False
    wandb: bool = False
    viewer: bool = False
    viewer_host: str = LOOPBACK
    viewer_port: int = PORT
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Reads a tolerance that was given as a number or a text.

        Raises:
            ValueError: It is no tolerance.
        """
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", parse_tolerance(self.tolerance))

    @property
    @abstractmethod
    def task(self) -> Task:
        """What is asked for."""

    def with_absolute_paths(self) -> Self:
        """Returns the options with input files as absolute paths, so that a run goes on from any folder."""
        return self

    def check(self) -> None:
        """Checks values that no run can honour.

        Raises:
            ValueError: There is one; the message names it and says what to give.
        """
        least = {"threads": 1, "picture_every": 0, "checkpoint_every": 0, "seed": 0, "secants": 0}
        for name, smallest in (least | {"workers": 1, "window": 1}).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value}: give a whole number of at least {smallest}")
        if self.sequential and (self.workers or 1) > 1:
            raise ValueError(
                f"sequential with workers={self.workers}: the sequential run is one process; "
                "leave --workers out or leave --sequential out"
            )
        if self.wandb:
            check_wandb()
        if self.viewer:
            check_viewer(self.viewer_host, self.viewer_port)
        self.task.check()

    def check_new(self) -> None:
        """Checks what only a new run needs: its picture must exist, its output folder must be empty.

        Raises:
            ValueError: There is no such picture.
            FileExistsError: `out` is taken, or a file; the message says what to do.
        """
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"--out {self.out} is a file: give a folder")
        files = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if files - {PLAN} and not self.overwrite:
            quoted = shlex.quote(str(self.out))
            raise FileExistsError(
                f"--out {self.out} is not empty: give another folder, go on with `picardopt resume {quoted}`, or add "
                "--overwrite to replace the files of an earlier run"
            )


@dataclass(frozen=True, kw_only=True)
class TextTo3DConfig(RunConfig[R], Generic[R]):
    """The options of a run from a text to a 3D object.

    Attributes:
        prompt: What to make; the shipped guidance knows eight shapes in eight colours.
    """

    prompt: Positional[str]

    @property
    def task(self) -> TextTask:
        """The text."""
        return TextTask(self.prompt)


@dataclass(frozen=True, kw_only=True)
class ImageTo3DConfig(RunConfig[R], Generic[R]):
    """The options of a run from a picture to a 3D object.

    Attributes:
        image: A picture of the object: RGBA with a transparent background, or another one that `cut_background` or
            rembg, if it is installed, cuts out.
        elevation: Elevation of the camera that took it, degrees above the horizon.
        azimuth: Azimuth of that camera, degrees about the vertical axis; 0 makes the side that it shows the front.
        framed: Leave the picture as it is; otherwise the object is centred and scaled to fill most of it.
        cut_background: Cut a plain background, white or of another single colour, without rembg.
        subject: What it shows, if that is in the built-in world ("a red chair"). Only the comparison with the true
            views uses it, not the run.
    """

    image: Positional[Path]
    elevation: float = 0.0
    azimuth: float = 0.0
    framed: bool = False
    cut_background: bool = False
    subject: str | None = None

    @property
    def task(self) -> ImageTask:
        """The picture, with the camera that took it."""
        return ImageTask(
            self.image,
            self.elevation,
            self.azimuth,
            framed=self.framed,
            cut_background=self.cut_background,
            subject=self.subject,
        )

    def with_absolute_paths(self) -> Self:
        """Returns the options with the picture as an absolute path."""
        return replace(self, image=self.image.absolute())

    def check_new(self) -> None:
        """Checks that there is a picture, and what every new run needs."""
        if not self.image.is_file():
            raise ValueError(f"image={self.image}: there is no such file; give a picture")
        super().check_new()


COMMANDS: dict[str, type[RunConfig[Any]]] = {
    "text-to-3d": TextTo3DConfig,
    "image-to-3d": ImageTo3DConfig,
}
"""The options of each command; a run's file names its command."""
