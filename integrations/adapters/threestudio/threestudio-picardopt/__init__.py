"""threestudio's systems, several steps at a time: copy this folder into threestudio's `custom/`.

`system_type=dreamfusion-system:picard` then runs the system `dreamfusion-system` with `PicardSystem` in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import threestudio
import torch
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.base import update_end_if_possible, update_if_possible
from threestudio.utils.config import config_to_primitive
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, init_process_group

if not torch.distributed.is_initialized():
    init_process_group()  # joins the processes of torchrun; without it nothing happens


@threestudio.register("picard")
class PicardSystem:
    """Goes in front of a system, and evaluates its training step as a function of the step.

    All that threestudio does in a step belongs to it: what it updates by the step (sizes, schedules, occupancy), the
    batch, the loss. Lightning's own batches are not used. Options of `ParallelPicardOptimizer` stand in the
    configuration under `system.optimizer.picard`.
    """

    automatic_optimization = False
    _at: int | None = None
    """The step that is being evaluated, if one is."""
    _logged: list[Any] | None = None
    """What it logs."""

    @property
    def true_global_step(self) -> int:
        """The step that is being evaluated, else that of the run: weights that follow the step read it."""
        return super().true_global_step if self._at is None else self._at  # type: ignore[misc]

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Logs a value; those of a step that is evaluated are logged when that step is taken."""
        if self._logged is None:
            super().log(name, value, *args, **options)  # type: ignore[misc]
            return
        value = value.detach() if isinstance(value, Tensor) else value
        self._logged.append((name, value, args, options))

    def options(self) -> dict[str, Any]:
        """Returns options of `ParallelPicardOptimizer`.

        Those in the configuration win over those that the system behind this class names in a method
        `picard_options`: `restructure` where it changes the number of parameters.
        """
        own = getattr(super(), "picard_options", dict)
        configured = self.cfg.optimizer.get("picard", {})
        limit = self.trainer.max_steps
        return {
            "carry": list(carried(self)),
            "total_steps": limit if limit > 0 else None,
            **own(),
            **(config_to_primitive(configured) if configured else {}),
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """Wraps the configured optimizer; the scheduler that goes with it is known ahead.

        Raises:
            ValueError: The trainer scales gradients, or the renderer's estimator is trained itself.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"trainer.precision={self.trainer.precision}: its GradScaler expects one gradient a step, so nothing "
                "can run ahead; take bf16-mixed or 32"
            )
        base = parse_optimizer(self.cfg.optimizer, self)
        optimizer = ParallelPicardOptimizer(base, **self.options())
        if self.cfg.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = parse_scheduler(self.cfg.scheduler, optimizer)
        if scheduler["interval"] == "step":
            optimizer.lr_scheduler = scheduler["scheduler"]
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Updates by the step; first forgets the levels that a later step, evaluated ahead, has added to encodings."""
        for module in self.modules():
            if hasattr(module, "current_level"):
                module.mask.zero_()
        super().do_update_step(epoch, global_step, on_load_weights)  # type: ignore[misc]

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> None:
        """Leaves the updates to `evaluate`."""
        self.dataset = self.trainer.train_dataloader.dataset

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Does nothing, likewise."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Takes one step."""
        optimizer = self.optimizers()
        returned = optimizer.step(self.evaluate)
        if optimizer.optimizer.lr_scheduler is not None:
            optimizer.optimizer.lr_scheduler.step()
        for name, value, args, options in returned["logged"]:
            self.log(name, value, *args, **options)
        return {"loss": returned["loss"]}

    def evaluate(self, step: int) -> dict[str, Any]:
        """Returns a step's loss and what it logs; sets its gradients."""
        self.optimizers().zero_grad()
        self._at, self._logged = step, []
        try:
            now = self.true_current_epoch, step
            with buffers_stay(self):
                update_if_possible(self.dataset, *now)
                self.do_update_step(*now)
            loss = super().training_step(self.draw_batch(), step)["loss"]  # type: ignore[misc]
            self.manual_backward(loss)
            with buffers_stay(self):
                update_end_if_possible(self.dataset, *now)
                self.do_update_step_end(*now)
            return {"loss": loss, "logged": self._logged}
        finally:
            self._at = self._logged = None

    def draw_batch(self) -> Any:
        """Returns a batch, drawn in this process: threestudio's data sets draw it at random and count nothing."""
        loader = self.trainer.train_dataloader
        items = iter(loader.dataset)
        size = loader.batch_size
        drawn = next(items) if size is None else [next(items) for _ in range(size)]
        batch = self.transfer_batch_to_device(loader.collate_fn(drawn), self.device, 0)
        self.preprocess_data(batch, "train")
        return batch


def carried(system: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors that steps rewrite besides parameters: those of nerfacc's occupancy grids.

    Raises:
        ValueError: An estimator has none, because it trains a network of its own.
    """
    for module in system.modules():
        if hasattr(module, "update_every_n_steps"):
            if not hasattr(module, "occs"):
                raise ValueError(
                    f"{type(module).__name__} steps an optimizer of its own within a step; take "
                    "system.renderer.estimator=occgrid or importance"
                )
            yield from (module.get_buffer(name) for name in ("occs", "binaries"))


@contextmanager
def buffers_stay(system: nn.Module) -> Iterator[None]:
    """Writes into the old buffers what the block puts in their place: nerfacc does so with `binaries`."""
    before = [
        (module, name, buffer)
        for module in system.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer in before:
        new = module.get_buffer(name)
        if new is not buffer:
            with torch.no_grad():
                buffer.copy_(new)
            setattr(module, name, buffer)
