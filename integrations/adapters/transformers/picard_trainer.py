"""transformers' Trainer, with an optimizer that runs ahead: copy this file beside your script.

The Trainer computes a step's gradients before it calls `optimizer.step()`. Here it computes them inside, from the
batches of the step that is asked for, with its own `training_step`, losses, accumulation and clipping::

    trainer = PicardTrainer(picard={"window": 8}, model=model, args=arguments, train_dataset=dataset)
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from picardopt import ParallelPicardOptimizer, StepIndexedLoader


class TakenInside(ParallelPicardOptimizer):
    """Takes its steps in `training_step`, with a closure; the Trainer's own call comes later and does nothing."""

    def step(self, closure: Any = None) -> Any:
        """Commits one step, if there is a closure."""
        return None if closure is None else super().step(closure)


class PicardTrainer(Trainer):
    """A Trainer that evaluates steps ahead of time, on every process that `torchrun` starts.

    Args:
        picard: Options of `ParallelPicardOptimizer`: window, tolerance, ... Its seed is the Trainer's unless given.

    The rest is the Trainer's own. Processes share the window, not the batch: each evaluates whole batches of
    `per_device_train_batch_size`.

    Raises:
        ValueError: If the training dataset is an iterable one, or float16 is asked for, whose scaler expects one
            gradient a step.
    """

    def __init__(
        self, *arguments: Any, picard: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.picard: ParallelPicardOptimizer | None = None
        super().__init__(*arguments, **options)
        if self.args.fp16:
            raise ValueError("fp16=True scales losses by what the last step found: use bf16=True")
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                "train_dataset is an iterable dataset, whose epochs have no length: give a map-style one"
            )
        # Summed over the processes it would mix the batches of different steps.
        self.args.average_tokens_across_devices = False
        self._picard_options = {"seed": self.args.seed, **(picard or {})}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of whole batches in the Trainer's own order; by step they come from `self.batches`."""
        prepared = super().get_train_dataloader()
        order = getattr(
            prepared.batch_sampler, "batch_sampler", prepared.batch_sampler
        )  # not this process's part
        plain = DataLoader(prepared.dataset, batch_sampler=order, collate_fn=prepared.collate_fn)
        self.batches = StepIndexedLoader(plain, seed=self.args.data_seed or self.args.seed)
        return plain

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Wraps the Trainer's own optimizer; the model stays as it is, not wrapped for data parallelism."""
        optimizer = super().create_optimizer(model)
        if self.picard is None:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.optimizer = self.picard = TakenInside(optimizer, **self._picard_options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tells the optimizer which learning rates will come."""
        self.picard.lr_scheduler = super().create_scheduler(num_training_steps, self.picard)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Takes a step with the last batch of each accumulation; its batches come by step, not from `inputs`."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        trainer = weakref.ref(self)  # what a Trainer counts is no change of what the closure reads

        def closure(step: int) -> tuple[Tensor, Tensor | float | None]:
            return trainer().evaluate_step(model, step)

        loss, self._norm = self.picard.step(closure)
        return loss

    def evaluate_step(self, model: Any, step: int) -> tuple[Tensor, Tensor | float | None]:
        """Computes a step's gradients, clipped: the closure.

        Returns:
            The loss, and the gradients' norm before clipping.
        """
        model.zero_grad()
        group = [self.batches.batch(index) for index in self._batches_of(step)]
        count = self._get_num_items_in_batch(group, self.args.device)
        before = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = len(group)
        try:
            losses = [
                super(PicardTrainer, self).training_step(model, batch, count) for batch in group
            ]
        finally:
            self.current_gradient_accumulation_steps = before
        clips = self.args.max_grad_norm is not None and self.args.max_grad_norm > 0
        return torch.stack(losses).sum(), super()._clip_grad_norm(model) if clips else None

    def _batches_of(self, step: int) -> range:
        """The batches that a step accumulates, counted over all epochs: the last step of an epoch may have fewer."""
        size, per_epoch = self.args.gradient_accumulation_steps, len(self.batches)
        epoch, inside = divmod(step, -(-per_epoch // size))
        first = epoch * per_epoch + inside * size
        return range(first, min(first + size, (epoch + 1) * per_epoch))

    def _clip_grad_norm(self, model: Any) -> Any:
        """The closure has clipped: says by what norm."""
        return self._norm
