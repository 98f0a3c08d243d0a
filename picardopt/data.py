"""A DataLoader whose batches are addressed by step, as running ahead needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from picardopt.rng import step_rng


class StepIndexedLoader:
    """Gives batch t of a DataLoader's endless run over its epochs, at any time and as often as asked.

    The order is the loader's own: its sampler, batch sampler, shuffling and ``generator``, epoch after epoch;
    samplers with ``set_epoch`` are told the epoch. Items are fetched and collated in this process, when the
    batch is asked for, so that random augmentation draws from the step's own randomness::

        loader = StepIndexedLoader(DataLoader(dataset, batch_size=4, shuffle=True, generator=generator))

        def closure(step):
            images, labels = loader.batch(step)

    Args:
        loader: Over a map-style dataset. Its workers are not used.
        seed: Orders epochs where the loader has no generator of its own: those then depend on (seed, epoch).

    Raises:
        TypeError: If the loader's dataset is an iterable one: it cannot be addressed.
        ValueError: If the loader has no batches, or does not batch.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise TypeError(
                "loader has an IterableDataset, which cannot be addressed by step: use a map-style one"
            )
        if loader.batch_sampler is None:
            raise ValueError("loader has batch_size=None: give it a batch_size or a batch_sampler")
        self._loader, self._seed = loader, seed
        # Not the loader itself: its order alone, through torch's own code.
        self._order: DataLoader[int] = DataLoader(
            _Positions(),
            batch_sampler=_Sized(loader.batch_sampler),
            collate_fn=list,
            generator=loader.generator,
        )
        samplers = (loader, loader.batch_sampler, loader.sampler)
        drawn_from = {
            id(g): g for g in (getattr(s, "generator", None) for s in samplers) if g is not None
        }
        self._start = [(g, g.get_state()) for g in drawn_from.values()]
        self._epoch = -1
        self._batches = self._list_epoch(0)
        if not self._batches:
            raise ValueError(
                "loader has no batches: is the dataset empty, or smaller than a batch with drop_last?"
            )

    def __len__(self) -> int:
        """Batches in the present epoch."""
        return len(self._batches)

    def batch(self, step: int) -> Any:
        """The batch of a step, collated as the loader does.

        Args:
            step: Index of the step, 0 for the first batch of the first epoch.

        Raises:
            IndexError: If the step is negative.
        """
        if step < 0:
            raise IndexError(f"step={step}: steps are counted from 0")
        epoch, position = divmod(step, len(self._batches))
        if epoch != self._epoch:
            self._batches = self._list_epoch(epoch)
        dataset = self._loader.dataset
        return self._loader.collate_fn([dataset[index] for index in self._batches[position]])

    def _list_epoch(self, epoch: int) -> list[list[int]]:
        """The epoch's batches as lists of positions; generators are drawn from epoch by epoch."""
        first = epoch if not self._start else self._epoch + 1
        if epoch < first:
            first = 0
            for generator, state in self._start:
                generator.set_state(state)
        samplers: tuple[Any, ...] = (self._loader.batch_sampler, self._loader.sampler)
        for current in range(first, epoch + 1):
            for sampler in samplers:
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(current)
            with step_rng(self._seed, -1 - current):
                batches: list[list[int]] = list(self._order)
        self._epoch = epoch
        return batches


class _Positions(Dataset[int]):
    """Every item is its own index."""

    def __getitem__(self, index: int) -> int:
        return index


class _Sized(BatchSampler):
    """The loader's batch sampler, without a second look at its arguments."""

    def __init__(self, sampler: Any) -> None:
        self.batches = sampler

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
