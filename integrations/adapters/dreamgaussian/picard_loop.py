"""DreamGaussian's first stage, several steps at a time: what `dreamgaussian.diff` calls from main.py.

Copy this file next to main.py. DreamGaussian counts steps from 1, picardopt from 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt import Carry, ParallelPicardOptimizer, Restructure, init_process_group

STATISTICS = ("max_radii2D", "xyz_gradient_accum", "denom")
"""What steps measure of each Gaussian: attributes of `GaussianModel`."""


def start(seed: int = 0) -> None:
    """Joins the processes of torchrun, gives each its GPU, and seeds them alike: all begin with the same Gaussians."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    init_process_group()
    np.random.seed(seed)
    torch.manual_seed(seed)


def rank() -> int:
    """Returns this process's number, 0 without torchrun: the first one saves the result."""
    return int(os.environ.get("RANK", "0"))


def wrap(gui: Any) -> ParallelPicardOptimizer:
    """Wraps the optimizer that `GUI.prepare_train` has set up; options come from `picard.NAME=VALUE`."""
    opt, gaussians = gui.opt, gui.renderer.gaussians
    optimizer = ParallelPicardOptimizer(
        gaussians.optimizer,
        total_steps=None if opt.gui else opt.iters,
        carry=Carry(Statistics(gaussians), partial(record, gui)),
        restructure=Restructure(partial(densify, gui, gaussians), partial(due, opt)),
        **dict(getattr(opt, "picard", None) or {}),
    )
    optimizer.lr_scheduler = Rates(optimizer, gaussians.xyz_scheduler_args)
    return optimizer


def step(gui: Any) -> Tensor:
    """Takes one step and returns its loss."""
    returned = gui.optimizer.step(StepLoss(gui))
    gui.optimizer.lr_scheduler.step()
    loss: Tensor = returned["loss"]
    return loss


class StepLoss:
    """Evaluates a step's loss and gradients.

    An object and no method of the GUI: what the loop counts there (`GUI.step`) is nothing that a loss depends on.
    """

    def __init__(self, gui: Any) -> None:
        self.gui = gui

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns the loss, and what the step saw of each Gaussian."""
        self.gui.optimizer.zero_grad()
        loss, out = self.gui.loss(step + 1)
        loss.backward()
        return {
            "loss": loss,
            "step": step + 1,
            "gradient": out["viewspace_points"].grad,
            "visible": out["visibility_filter"],
            "radii": out["radii"],
        }


class Statistics(Sequence[Tensor]):
    """The present statistics: densification puts other tensors in their place."""

    def __init__(self, gaussians: Any) -> None:
        self.gaussians = gaussians

    def __len__(self) -> int:
        return len(STATISTICS)

    def __getitem__(self, index: Any) -> Any:
        return getattr(self.gaussians, STATISTICS[index])


def record(gui: Any, returned: dict[str, Any]) -> None:
    """Adds to the statistics what a step saw."""
    out = {
        "viewspace_points": SimpleNamespace(grad=returned["gradient"]),
        "visibility_filter": returned["visible"],
        "radii": returned["radii"],
    }
    gui.record(returned["step"], out)


def due(opt: Any, step: int) -> bool:
    """Returns whether Gaussians are added, removed or made transparent after a step."""
    count = step + 1
    changes = (opt.densification_interval, opt.opacity_reset_interval)
    within = opt.density_start_iter <= count <= opt.density_end_iter
    return within and any(count % every == 0 for every in changes)


def densify(gui: Any, gaussians: Any, step: int) -> None:
    """Adds and removes Gaussians. `gaussians` is named so that an error in the middle undoes what was done to it."""
    gui.densify(step + 1)


class Rates(LRScheduler):
    """The learning rates that `GaussianModel.update_learning_rate` sets before each step.

    Args:
        optimizer: The optimizer.
        of_positions: The rate of the group "xyz" by step; those of the others stay.
    """

    def __init__(self, optimizer: Optimizer, of_positions: Callable[[int], float]) -> None:
        self.of_positions = of_positions
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Returns the rates of the step that comes next."""
        return [
            self.of_positions(self.last_epoch + 1) if group["name"] == "xyz" else group["lr"]
            for group in self.optimizer.param_groups
        ]
