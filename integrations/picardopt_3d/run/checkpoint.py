"""The checkpoint of a stage: scene with carry, guidance, optimizers, record."""

from __future__ import annotations

from typing import Any

from picardopt import (
    CheckpointError,
    ParallelPicardOptimizer,
    load_checkpoint,
    save_checkpoint,
)
from picardopt_3d.problem import Problem
from picardopt_3d.run.folder import StageFolder
from picardopt_3d.run.record import RECORD_KEY, RunRecord, record_in


def save_stage(
    folder: StageFolder,
    problem: Problem,
    optimizer: ParallelPicardOptimizer,
    record: RunRecord,
) -> None:
    """Writes the last committed step and, beside it, the record alone."""
    state = problem.state_dict() | {"optimizer": optimizer.state_dict(), RECORD_KEY: vars(record)}
    folder.path.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder.checkpoint, state)
    record.save(folder)


def load_stage(
    folder: StageFolder,
    problem: Problem,
    optimizer: ParallelPicardOptimizer,
    record: RunRecord,
) -> None:
    """Goes on from what `save_stage` wrote.

    Raises:
        CheckpointError: The file cannot be used, or is of another configuration.
    """
    state = load_checkpoint(folder.checkpoint)
    earlier = record_in(folder, state)
    try:
        _check_options(optimizer, state["optimizer"]["param_groups"])
        problem.load_state_dict(state)
        optimizer.load_state_dict(dict(state["optimizer"]))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder.checkpoint} is of another configuration than the run's config.yaml: {error}; resume with "
            "the options of the run, or start a new one"
        ) from error
    # Sequential runs of earlier versions kept the wrapped optimizer alone, whose state has no step.
    optimizer.step_index = earlier.step
    record.take_over(earlier)


def _check_options(optimizer: ParallelPicardOptimizer, saved: list[dict[str, Any]]) -> None:
    """Refuses groups of another kind of optimizer; those of an older torch only lack options.

    Raises:
        ValueError: They have options that this one has not, and the other way round.
    """
    for own, other in zip(optimizer.param_groups, saved, strict=False):
        known, found = own.keys() - {"params"}, other.keys() - {"params"}
        if known - found and found - known:
            raise ValueError(
                f"its optimizer has the options {', '.join(sorted(found - known))}, which "
                f"{type(optimizer.base).__name__} has not"
            )
