"""What became of a run so far, and the checkpoint that keeps it with the scene and the optimizer."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from picardopt import CheckpointError, ParallelPicardOptimizer, load_checkpoint, save_checkpoint
from picardopt.stats import Stats

from .config import RunConfig
from .problem import Losses, Problem


@dataclass
class Trained:
    """What the optimisation tells, beside the scene file; it goes on where a resumed run was stopped.

    Args:
        figures: entries of the report.
        step: steps that are final.
        losses: loss of every step.
        strides: steps made final, one number a sweep.
        residuals: squared distance per parameter of every slot of every sweep.
        tolerances: the thresholds they were held against.
        drift_evaluations: slots evaluated, over all workers.
        wasted_evaluations: those that never became a step.
        seconds: of the optimisation, without start-up.
        startup_seconds: from the command to the first step.
        phase_seconds: of the first worker by phase of the optimizer.
    """

    figures: dict[str, Any]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    residuals: list[list[float]] = field(default_factory=list)
    tolerances: list[list[float]] = field(default_factory=list)
    drift_evaluations: int = 0
    wasted_evaluations: int = 0
    seconds: float = 0.0
    startup_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig[Any], workers: int, device: torch.device) -> Trained:
        """A record without steps."""
        return cls(
            {
                "title": config.title,
                "method": config.method,
                "preset": config.preset,
                "seed": config.seed,
                "guidance": config.recipe.guidance.model,
                "guidance_source": config.recipe.guidance.source or "shipped",
                "sequential": config.sequential,
                "workers": workers,
                "threads_per_worker": torch.get_num_threads(),
                "device": str(device),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "torch": str(torch.__version__),
                "steps": config.recipe.steps,
                "size": config.recipe.final_pixels,
                "predictor": config.predictor or config.recipe.picard.predictor,
                "window": 1,
                "tolerance": None,
            }
        )

    @property
    def mean_stride(self) -> float:
        """Steps that a sweep made final, on average."""
        return self.step / len(self.strides) if self.strides else 0.0

    def kept(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, path: Path) -> Trained:
        """The record that a run kept.

        Raises:
            CheckpointError: The file cannot be used.
        """
        return cls(**load_checkpoint(path)["trained"])


class Recorder:
    """Keeps a run's record up to date while it runs.

    Args:
        trained: the record, which goes on from where it stands.
        optimizer: what counts; None in a sequential run.
        started: `time.time()` when the command began.
    """

    def __init__(
        self, trained: Trained, optimizer: ParallelPicardOptimizer | None, started: float
    ) -> None:
        self.trained, self.optimizer = trained, optimizer
        self._begun, self._before = time.time(), trained.kept()
        trained.startup_seconds += self._begun - started
        if optimizer is not None:
            trained.figures |= {"window": optimizer.window, "tolerance": repr(optimizer.tolerance)}

    @property
    def stats(self) -> Stats | None:
        """What the optimizer has counted since the run began or went on; None in a sequential run."""
        return None if self.optimizer is None else self.optimizer.stats

    def took(self, step: int, values: Losses) -> None:
        """A step is final."""
        self.trained.step = step + 1
        self.trained.losses.append(float(values.total))

    def count(self) -> None:
        """Take over what was counted since."""
        trained, before, stats = self.trained, self._before, self.stats
        trained.seconds = before["seconds"] + time.time() - self._begun
        if stats is None or self.optimizer is None:
            trained.drift_evaluations = trained.step
            trained.strides = before["strides"] + [1] * (trained.step - before["step"])
            return
        # An interrupt between a commit and its record leaves the loss unknown.
        trained.step = self.optimizer.step_index
        trained.losses += [math.nan] * (trained.step - len(trained.losses))
        for name in ("strides", "residuals", "tolerances"):
            setattr(trained, name, before[name] + getattr(stats, name))
        for name in ("drift_evaluations", "wasted_evaluations"):
            setattr(trained, name, before[name] + getattr(stats, name))
        trained.phase_seconds = {
            phase: before["phase_seconds"].get(phase, 0.0) + seconds
            for phase, seconds in stats.seconds.items()
        }


def save_run(
    path: Path,
    recorder: Recorder,
    problem: Problem,
    optimizer: ParallelPicardOptimizer | torch.optim.Optimizer,
) -> None:
    """Keep the last committed step: the scene with its carry, the guidance, the optimizer, the record."""
    recorder.count()
    state = problem.state_dict() | {
        "optimizer": optimizer.state_dict(),
        "trained": recorder.trained.kept(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state)


def load_run(
    path: Path,
    trained: Trained,
    problem: Problem,
    optimizer: ParallelPicardOptimizer | torch.optim.Optimizer,
) -> None:
    """Go on from what `save_run` kept.

    Raises:
        CheckpointError: The file cannot be used, or is of another configuration.
    """
    state = load_checkpoint(path)
    kept = Trained(**state["trained"])
    try:
        problem.load_state_dict(state)
        optimizer_state = dict(state["optimizer"])
        if not isinstance(optimizer, ParallelPicardOptimizer):
            optimizer_state.pop("picard", None)
        optimizer.load_state_dict(optimizer_state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is of another configuration than the run's folder says: {error}"
        ) from error
    if isinstance(optimizer, ParallelPicardOptimizer):
        optimizer.step_index = kept.step  # a sequential run's state does not hold it
    for item in fields(trained):
        if item.name != "figures":
            setattr(trained, item.name, getattr(kept, item.name))
