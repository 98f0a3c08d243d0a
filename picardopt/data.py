"""A DataLoader whose batches are addressed by step, as running ahead needs them."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from picardopt.compat import accelerator, gives_in_order
from picardopt.rng import step_rng

_REMEMBERED = 1024
"""Batches of past epochs that are remembered, beyond the last two epochs."""


class StepIndexedLoader:
    """Gives batch t of a DataLoader's endless run over its epochs, in any order and any number of times.

    The order is the loader's own: its sampler, batch sampler, shuffling and ``generator``, epoch after epoch, drawn
    from copies, so that the loader itself is left alone; samplers with ``set_epoch`` receive the epoch. Items are
    fetched and collated in this process, when the batch is asked for, so that random augmentation draws from the
    step's own randomness::

        loader = StepIndexedLoader(DataLoader(dataset, batch_size=4, shuffle=True, generator=generator))

        def closure(step):
            images, labels = loader.batch(step)

    Args:
        loader: Over a map-style dataset. Its workers are not used.
        seed: Orders the epochs if the loader has no generator of its own: their order then depends on (seed, epoch).

    Raises:
        TypeError: If the loader's dataset is an iterable one, its sampler cannot be copied, or its class iterates in a
            way of its own.
        ValueError: If the loader has no batches, does not batch, or has an option that only workers could carry out.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        _check(loader)
        self._loader, self._epochs = loader, _Epochs(loader, seed)
        device = accelerator()
        self._pin = loader.pin_memory and device is not None and device.type != "mps"
        self._length = len(self._epochs.batches(0))
        if not self._length:
            raise ValueError(
                "loader has no batches: is the dataset empty, or smaller than a batch with drop_last?"
            )

    def __len__(self) -> int:
        """Number of batches in the epoch of the last `batch` call, at first in the first epoch."""
        return self._length

    def batch(self, step: int) -> Any:
        """Returns the batch of a step, collated as the loader does.

        Args:
            step: Index of the step, 0 for the first batch of the first epoch.

        Raises:
            IndexError: If the step is negative.
        """
        if step < 0:
            raise IndexError(f"step={step}: steps are counted from 0")
        epoch, position = self._epochs.find(step)
        batches = self._epochs.batches(epoch)
        self._length = len(batches)
        indices, dataset = copy.copy(batches[position]), self._loader.dataset
        read_many = getattr(dataset, "__getitems__", None)
        items = read_many(indices) if read_many else [dataset[index] for index in indices]
        batch = self._loader.collate_fn(items)
        return pin_memory(batch) if self._pin else batch


class _Epochs:
    """The indices of each epoch's batches, drawn as the loader draws them.

    Epochs are drawn in order, because a generator, or a sampler that counts, cannot skip any. The last ones are
    kept: a window across the end of an epoch switches back and forth between two.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader, self._seed = loader, seed
        self._first = self._copied((_samplers(loader), loader.batch_sampler, loader.generator))
        # Torch's own samplers without a generator draw from the seeded global one: any epoch can be listed at once.
        self._any_order = loader.generator is None and all(map(_has_no_state, _samplers(loader)))
        self._starts = [0]  # the first step of each epoch, as far as they were listed
        self._remembered: dict[int, list[Any]] = {}
        self._rewind()

    def find(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step, and its position in it."""
        if self._any_order:
            return divmod(step, self._starts[1])
        while step >= self._starts[-1]:
            if not self.batches(len(self._starts) - 1):
                raise ValueError(
                    f"loader has no batches in epoch {len(self._starts) - 2}: give it a sampler that has some in each"
                )
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def batches(self, epoch: int) -> list[Any]:
        """Returns the indices of each of an epoch's batches."""
        if epoch not in self._remembered:
            if self._any_order:
                self._next = epoch
            elif epoch < self._next:
                self._rewind()
            while self._next <= epoch:
                self._remember(self._next, self._draw(self._next))
                self._next += 1
        return self._remembered[epoch]

    def _rewind(self) -> None:
        self._samplers, self._order, self._generator = self._copied(self._first)
        self._next = 0

    def _draw(self, epoch: int) -> list[Any]:
        """Returns an epoch's batches, drawn in the order of the loader's iterators: some samplers draw in `iter`."""
        loader = self._loader
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        with step_rng(self._seed, -1 - epoch):
            order = iter(self._order)
            if epoch == 0 or not loader.persistent_workers:
                # A new iterator draws a seed for workers, and one with workers begins its sampler anew.
                torch.empty((), dtype=torch.int64).random_(generator=self._generator)
                order = iter(self._order) if loader.num_workers else order
            return [copy.copy(b) if isinstance(b, Collection) else list(b) for b in order]

    def _remember(self, epoch: int, batches: list[Any]) -> None:
        if epoch == len(self._starts) - 1:
            self._starts.append(self._starts[-1] + len(batches))
        self._remembered[epoch] = batches
        count = sum(map(len, self._remembered.values()))
        for old in list(self._remembered)[:-2]:  # oldest first
            count -= len(self._remembered[old])
            if count < _REMEMBERED:
                break
            del self._remembered[old]

    def _copied(self, samplers: Any) -> Any:
        """Returns a copy that draws independently; only the data that samplers refer to is shared."""
        data: list[Any] = [self._loader.dataset]
        for sampler in _samplers(self._loader):
            data += [v for v in getattr(sampler, "__dict__", {}).values() if isinstance(v, Dataset)]
            data.append(getattr(sampler, "data_source", None))
        try:
            return copy.deepcopy(samplers, {id(each): each for each in data})
        except Exception as error:
            names = ", ".join(type(sampler).__name__ for sampler in _samplers(self._loader))
            raise TypeError(
                f"loader's sampler ({names}) cannot be copied: {error}. Running ahead needs that to list an epoch "
                "again: give a sampler that copy.deepcopy takes"
            ) from error


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """Returns the objects that order a loader's items, outermost first."""
    found: list[Any] = []
    for sampler in (loader.batch_sampler, loader.sampler):
        while sampler is not None and all(sampler is not each for each in found):
            found.append(sampler)
            sampler = getattr(sampler, "sampler", None)
    return found


def _has_no_state(sampler: Any) -> bool:
    """Returns whether a sampler's order depends on the global generators and its epoch alone."""
    if isinstance(sampler, list | tuple | range):
        return True
    own = type(sampler).__module__.startswith("torch.utils.data.")
    return own and getattr(sampler, "generator", None) is None


def _check(loader: DataLoader[Any]) -> None:
    """Refuses loaders whose batches could not be reproduced by step."""
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "loader has an IterableDataset, which cannot be addressed by step: use a map-style one, or "
            "StepIndexedSource(loader), which draws its batches in order and keeps those that may be needed"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"loader is a {type(loader).__name__}, which iterates in a way of its own: give the plain DataLoader"
        )
    if loader.batch_sampler is None:
        raise ValueError("loader has batch_size=None: give it a batch_size or a batch_sampler")
    if loader.num_workers > 0 and loader.worker_init_fn is not None:
        raise ValueError(
            "loader has a worker_init_fn, but its workers are not used: leave it out, and do its work in the dataset"
        )
    if loader.num_workers > 1 and not gives_in_order(loader):
        raise ValueError(
            "loader has in_order=False: its batches come in the order in which workers finish, not by step; "
            "leave it out"
        )
