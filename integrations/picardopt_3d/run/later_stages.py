"""What can be known of a recipe's later stages before an earlier one is trained, and what is said where one fails."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from picardopt_3d.config import RunConfig
from picardopt_3d.guidance.choose import check_source
from picardopt_3d.scenes import check_conversion


def check_later_stages(config: RunConfig[Any], first: int) -> None:
    """Checks that each stage can start from the scene of the one before, and that its score model is there.

    Args:
        config: The run's options.
        first: Index of the stage that comes first; it is not checked, because it is prepared next.

    Raises:
        ValueError: A scene cannot be converted, or a score model is of another kind; the message names the stage.
        OSError: A score model cannot be had.
    """
    stages = config.recipe.stages()[first:]
    for before, stage in itertools.pairwise(stages):
        try:
            check_conversion(stage.config.scene, before.config.scene)
            check_source(stage.config.guidance)
        except (TypeError, ValueError, OSError) as error:
            raise _user_error(error, f"stage {stage.name!r}: {error}") from error


@contextlib.contextmanager
def earlier_stage_kept(config: RunConfig[Any], index: int) -> Iterator[None]:
    """Says in an error that a stage cannot begin with, what is kept and how to go on.

    Args:
        config: The run's options.
        index: Of the stage that begins.

    Raises:
        ValueError, OSError: In place of an error of the same kind, or a TypeError.
    """
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        if index == 0:
            raise
        stages = config.recipe.stages()
        raise _user_error(
            error,
            f"stage {stages[index].name!r} cannot begin: {error}. Stage {stages[index - 1].name!r} is finished and "
            f"kept: `picardopt resume {config.out}` goes on from it, with other options if you give some "
            f"(--recipe.{stages[index].name}...), and `picardopt export {config.out}` writes its object",
        ) from error


def _user_error(error: Exception, message: str) -> ValueError | OSError:
    """Returns an error like another one, with another message."""
    for kind in (FileNotFoundError, PermissionError, OSError):
        if isinstance(error, kind):
            return kind(message)
    return ValueError(message)
