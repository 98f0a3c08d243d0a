"""What a run is told, how it is kept beside the run, and how it is read again."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import dacite
import yaml
from tyro.conf import Positional

from .domain import parse_prompt
from .export.files import replacing
from .methods import METHODS, Method, StageConfig

CONFIG_FILE = "config.yaml"

R = TypeVar("R", bound=StageConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ABC, Generic[R]):
    """One run; what is asked for is said by `TextTo3DConfig` and `ImageTo3DConfig`.

    Checked by `check`, not on construction: a command line is filled in bit by bit.

    Args:
        out: folder for the run's files; made if absent, must be empty unless `overwrite`.
        method: name of the recipe, whose numbers are `recipe`: of a text dreamfusion or textmesh, of a picture zero123.
        preset: which of the recipe's presets the numbers began as: small (minutes on two CPU cores with what ships),
            paper (the published settings, with models of the hub); of dreamfusion also small-nerf and paper-sd.
        recipe: the numbers: batch, pixels, scene, losses, guidance, ...
        seed: of the whole run: the same seed gives the same object.
        workers: processes (one device each); None: one per accelerator, else two if the machine
            has two cores.
        window: steps evaluated by one sweep; None: the recipe's, which by default is one per worker.
        tolerance: largest residual accepted (0: exactly the sequential run, inf: everything),
            "adaptive" (the paper's rule), "step-relative", or None: the recipe's.
        predictor: what fills new slots of the window; None: the recipe's.
        sequential: run the plain loop with the wrapped optimizer alone, in one process.
        picture_every: steps between progress pictures; 0: none.
        checkpoint_every: steps between checkpoints; 0: only at the end and at Ctrl-C.
        tensorboard: write losses, strides and pictures for TensorBoard as well.
        threads: CPU threads a process; the same number gives the same bits.
        device: "auto" (accelerators if there are), "cpu" or "cuda".
        overwrite: allow an `out` that holds files of an earlier run.
    """

    out: Path
    method: str
    preset: str
    recipe: R
    seed: int = 0
    workers: int | None = None
    window: int | None = None
    tolerance: float | Literal["adaptive", "step-relative"] | None = None
    predictor: Literal["coast", "hold"] | None = None
    sequential: bool = False
    picture_every: int = 100
    checkpoint_every: int = 500
    tensorboard: bool = False
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False

    @property
    @abstractmethod
    def title(self) -> str:
        """What is asked for, in a few words."""

    def check(self) -> None:
        """Refuse values that no run can honour, by name, with the remedy.

        Raises:
            ValueError: There is one.
        """
        for name, least in (
            ("threads", 1),
            ("picture_every", 0),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            _at_least(name, getattr(self, name), least)
        for name in ("workers", "window"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if isinstance(self.tolerance, float | int) and not self.tolerance >= 0:
            raise ValueError(
                f"tolerance={self.tolerance}: give 0 (exact), a positive number, inf, "
                '"adaptive" or "step-relative"'
            )
        if self.sequential and (self.workers or 1) > 1:
            raise ValueError(
                f"sequential with workers={self.workers}: the sequential run is one process; "
                "leave --workers out or leave --sequential out"
            )


@dataclass(frozen=True, kw_only=True)
class TextTo3DConfig(RunConfig[R], Generic[R]):
    """One run from a text to a 3D object.

    Args:
        prompt: what to make; the shipped guidance knows eight shapes in eight colours.
    """

    prompt: Positional[str]

    @property
    def title(self) -> str:
        """The text."""
        return self.prompt

    def check(self) -> None:
        """Refuse an empty text, and what no run can honour."""
        super().check()
        if not self.prompt.strip():
            raise ValueError('prompt is empty: describe an object, e.g. "a red cube"')


@dataclass(frozen=True, kw_only=True)
class ImageTo3DConfig(RunConfig[R], Generic[R]):
    """One run from a picture to a 3D object.

    Args:
        image: a picture of the object: RGBA with a transparent background, or another one that `cut_background` or
            rembg, if it is installed, cuts out.
        elevation: of the camera that took it, degrees above the horizon.
        azimuth: of that camera, degrees about the vertical axis; 0 calls its side the front.
        framed: leave the picture as it is; otherwise the object is centred and scaled to fill most of it.
        cut_background: cut a plain background, white or of another single colour, without rembg.
        subject: what it shows, where that is one of the built-in world's ("a red chair"): for comparison with the true
            views alone, the run does not see it.
    """

    image: Positional[Path]
    elevation: float = 0.0
    azimuth: float = 0.0
    framed: bool = False
    cut_background: bool = False
    subject: str | None = None

    @property
    def title(self) -> str:
        """The picture's name."""
        return self.image.name

    def check(self) -> None:
        """Refuse a camera that cannot be, and what no run can honour."""
        super().check()
        if not -90 <= self.elevation <= 90:
            raise ValueError(f"elevation={self.elevation}: give an angle from -90 to 90 degrees")
        if self.subject is not None and parse_prompt(self.subject) is None:
            raise ValueError(
                f"subject={self.subject!r} is not of the built-in world: give a shape and a colour of it, such as "
                '"a red chair", or leave it out'
            )


COMMANDS: dict[str, type[RunConfig[Any]]] = {
    "text-to-3d": TextTo3DConfig,
    "image-to-3d": ImageTo3DConfig,
}
"""The configuration of each command; a run's file names its command."""


def _at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError that says what to give."""
    if value < least:
        raise ValueError(f"{name}={value}: give a whole number of at least {least}")


def check_new(config: RunConfig[Any]) -> None:
    """Refuse what only a run that goes on can do with: no picture (it has its own), an output folder with files in it.

    Raises:
        ValueError: There is no such picture.
        FileExistsError: `out` is taken, or a file; the message says what to do.
    """
    if isinstance(config, ImageTo3DConfig) and not config.image.is_file():
        raise ValueError(f"image={config.image}: there is no such file; give a picture")
    if config.out.exists() and not config.out.is_dir():
        raise FileExistsError(f"--out {config.out} is a file: give a folder")
    if config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite:
        raise FileExistsError(
            f"--out {config.out} is not empty: give another folder, go on with `picardopt resume {config.out}`, or add "
            "--overwrite to replace the files of an earlier run"
        )


def default_workers(accelerators: int) -> int:
    """One worker per accelerator if there are any, else two where two cores are available."""
    return accelerators or min(2, len(os.sched_getaffinity(0)))


# -- files ------------------------------------------------------------------------------------------------


def save_config(config: RunConfig[Any], path: Path) -> None:
    """Write a configuration as YAML that `load_config` and `--config` read."""
    command = next(name for name, kind in COMMANDS.items() if isinstance(config, kind))
    with replacing(path) as temporary:
        content = {"command": command} | plain(config)
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def load_config(path: Path) -> RunConfig[Any]:
    """Read what `save_config` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no run's configuration; the message names the key.
    """
    content = read_yaml(path)
    command = content.pop("command", None)
    if command not in COMMANDS:
        raise ValueError(f"{path}: command={command!r}: give one of {', '.join(COMMANDS)}")
    method = find_method(content.get("method"), command)
    config: RunConfig[Any] = build(COMMANDS[command], method.config, content, str(path))
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a YAML configuration")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: give a mapping of options, such as 'seed: 1'")
    return content


def find_method(name: Any, command: str) -> Method:
    """The entry of a method, checked to be one of a command.

    Raises:
        ValueError: There is none of that name for it.
    """
    known = {key: entry for key, entry in METHODS.items() if entry.command == command}
    if name not in known:
        raise ValueError(f"method={name!r}: give one of {', '.join(known)} ({command})")
    return known[name]


def find_preset(name: Any, method: Method) -> StageConfig:
    """A method's preset.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in method.presets:
        raise ValueError(f"preset={name!r}: give one of {', '.join(method.presets)}")
    return method.presets[name]


def build(kind: type[Any], recipe: type[Any], content: Mapping[str, Any], source: str) -> Any:
    """A configuration from plain values.

    Args:
        kind: its class, of runs; or a recipe's, and then `recipe` is the same.
        recipe: the class of the recipe in it.
        content: plain values, as `plain` makes them.
        source: where they are from, for errors.

    Raises:
        ValueError: A key is unknown or a value unusable; the message names it.
    """
    options = dacite.Config(strict=True, cast=[tuple, Path], type_hooks={float: float})
    try:
        return dacite.from_dict(kind if kind is recipe else kind[recipe], content, options)
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second one's values over the first one's."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def plain(value: Any) -> Any:
    """A configuration as YAML can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
