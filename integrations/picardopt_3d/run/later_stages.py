"""What can be known of a recipe's later stages before an earlier one is trained, and what is said where one fails."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Iterator
from typing import Any

import torch

from picardopt.compat import add_note
from picardopt_3d.config import RunConfig
from picardopt_3d.devices import pick_device
from picardopt_3d.guidance.choose import check_denoising, check_source
from picardopt_3d.methods import StageConfig
from picardopt_3d.methods.optim import check_rates
from picardopt_3d.scenes import SceneConfig, check_conversion, check_rasterizer, trained_groups


def check_later_stages(config: RunConfig[Any], first: int) -> None:
    """Checks what is known of each stage before it is made; no scene is made, and no model is loaded.

    It is whether it can start from the scene of the one before, whether its score model is there and has the noise
    levels, whether each group of parameters has a rate, and whether its rasterizer can be used.

    Args:
        config: The run's options.
        first: Index of the stage that comes first; only whether it can start is checked, because it is prepared next.

    Raises:
        ValueError: Something cannot be used; the message names the stage.
        OSError: A score model cannot be had.
    """
    device, stages = pick_device(config.device), config.recipe.stages()
    for index, (before, stage) in enumerate(itertools.pairwise(stages), start=1):
        try:
            if index >= first:
                _check_start(stage.config.scene, before.config.scene)
            if index > first:
                _check_options(stage.config, device)
        except (ValueError, OSError) as error:
            raise _user_error(error, f"stage {stage.name!r}: {error}") from error


def _check_start(scene: SceneConfig, before: SceneConfig) -> None:
    """Checks that a scene can start from the one before.

    Raises:
        ValueError: It cannot.
    """
    try:
        check_conversion(scene, before)
    except TypeError as error:  # no conversion between the two kinds
        raise ValueError(str(error)) from error


def _check_options(stage: StageConfig, device: torch.device) -> None:
    """Checks a stage's model, rates and rasterizer; see `check_later_stages`."""
    check_source(stage.guidance)
    check_denoising(stage.guidance, stage.denoise)
    check_rates(stage, trained_groups(stage.scene))
    check_rasterizer(stage.scene, device)


@contextlib.contextmanager
def explained_stage(config: RunConfig[Any], index: int) -> Iterator[None]:
    """Says in an error that a stage cannot begin with, what is kept and how to go on.

    Args:
        config: The run's options.
        index: Of the stage that begins.

    Raises:
        ValueError, OSError: In place of an error of the same kind, or of one of a full device.
        Exception: Any other error, with a note that says the same.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            said = _on_a_full_device(config, index, said)
        elif index == 0:
            raise
        if index:
            name = config.recipe.stages()[index].name
            said = f"stage {name!r} cannot begin: {said.rstrip('.')}. {_kept(config, index)}"
        raise _user_error(error, said) from error
    except Exception as error:
        if index:
            add_note(error, _kept(config, index))
        raise


def _on_a_full_device(config: RunConfig[Any], index: int, said: str) -> str:
    """Adds to the error of a full device what needs less memory; returns one line."""
    stages = config.recipe.stages()
    options = "--recipe." + (f"{stages[index].name}." if len(stages) > 1 else "")
    model = f"{options}guidance.options.dtype float16"
    return (
        f"{' '.join(said.split())} Give fewer workers to a device (--workers), fewer or smaller views ({options}batch, "
        f"{options}pixels), a smaller scene ({options}scene...), or a model of half the size ({model})"
    )


def _kept(config: RunConfig[Any], index: int) -> str:
    """Says what is kept of a run whose next stage cannot begin."""
    stages, out = config.recipe.stages(), shlex.quote(str(config.out))
    return (
        f"Stage {stages[index - 1].name!r} is finished and kept: `picardopt resume {out}` goes on from it, with other "
        f"options if you give some (--recipe.{stages[index].name}...), and `picardopt export {out}` writes its object"
    )


def _user_error(error: Exception, message: str) -> ValueError | OSError:
    """Returns an error like another one, with another message."""
    for kind in (FileNotFoundError, PermissionError, OSError):
        if isinstance(error, kind):
            return kind(message)
    return ValueError(message)
