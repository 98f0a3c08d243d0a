"""StepIndexedLoader: the plain loader's batches, addressed by step."""

import itertools

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from picardopt import StepIndexedLoader, step_rng

DATA = TensorDataset(torch.arange(23), torch.arange(23) ** 2)


def generator():
    return torch.Generator().manual_seed(7)


LOADERS = {
    "in order": lambda: DataLoader(DATA, batch_size=4),
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True, generator=generator()),
    "drop last": lambda: DataLoader(
        DATA, batch_size=5, shuffle=True, drop_last=True, generator=generator()
    ),
    "weighted": lambda: DataLoader(
        DATA,
        batch_size=3,
        sampler=WeightedRandomSampler(torch.arange(23.0), 17, generator=generator()),
        generator=generator(),
    ),
    "with workers": lambda: DataLoader(
        DATA, batch_size=4, shuffle=True, generator=generator(), num_workers=1
    ),
}


def plain_batches(loader, epochs):
    return list(itertools.chain.from_iterable(list(loader) for _ in range(epochs)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LOADERS)
def test_three_epochs_in_the_plain_loaders_order(name):
    expected = plain_batches(LOADERS[name](), 3)
    loader = StepIndexedLoader(LOADERS[name]())
    assert all(same(batch, loader.batch(step)) for step, batch in enumerate(expected))
    if "shuffled" in name:
        assert not same(expected[0], expected[len(loader)])


@pytest.mark.parametrize("name", ["shuffled", "weighted"])
def test_any_order_of_asking_gives_the_same_batches(name):
    expected = plain_batches(LOADERS[name](), 4)
    loader = StepIndexedLoader(LOADERS[name]())
    steps = torch.randperm(len(expected), generator=generator()).tolist()
    assert all(same(expected[step], loader.batch(step)) for step in [*steps, *steps[:5]])


def test_a_distributed_sampler_is_told_the_epoch():
    def make():
        sampler = DistributedSampler(DATA, num_replicas=2, rank=1, seed=3)
        return DataLoader(DATA, batch_size=4, sampler=sampler), sampler

    plain, sampler = make()
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(plain)
    loader = StepIndexedLoader(make()[0])
    assert all(same(batch, loader.batch(step)) for step, batch in enumerate(expected))


def test_without_a_generator_the_order_is_the_seeds():
    def order(seed):
        loader = StepIndexedLoader(DataLoader(DATA, batch_size=4, shuffle=True), seed=seed)
        return torch.cat([loader.batch(step)[0] for step in range(12)])

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert torch.equal(first, order(0))
    assert not torch.equal(first, order(1))
    assert first[:23].sort().values.tolist() == list(range(23))


def test_augmentation_draws_from_the_steps_randomness():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + torch.rand(())

    loader = StepIndexedLoader(DataLoader(Noisy(torch.arange(8.0)), batch_size=4))
    with step_rng(0, 1):
        first = loader.batch(1)
    with step_rng(0, 1):
        again = loader.batch(1)
    with step_rng(0, 3):  # the same items, an epoch later
        later = loader.batch(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_what_cannot_be_addressed_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="map-style"):
        StepIndexedLoader(DataLoader(Stream()))
    with pytest.raises(ValueError, match="batch_size"):
        StepIndexedLoader(DataLoader(DATA, batch_size=None))
    with pytest.raises(ValueError, match="no batches"):
        StepIndexedLoader(DataLoader(DATA, batch_size=50, drop_last=True))
    with pytest.raises(IndexError, match="counted from 0"):
        StepIndexedLoader(DataLoader(DATA, batch_size=4)).batch(-1)
