"""StepIndexedLoader: the plain loader's batches, addressed by step."""

import inspect
import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from picardopt import StepIndexedLoader, step_rng
from tests.helpers.versions import needs_torch

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


@pytest.mark.parametrize("batched", [False, True])
def test_a_distributed_sampler_receives_the_epoch(batched):
    def make():
        sampler = DistributedSampler(DATA, num_replicas=2, rank=1, seed=3)
        if batched:
            return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, False)), sampler
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


# -- every argument of a DataLoader ------------------------------------------------------------------------


class ManyAtOnce(Dataset):
    """Reads a batch at once, and only so; what it returns is not a list of items."""

    def __len__(self):
        return 23

    def __getitems__(self, indices):
        return torch.tensor(indices), len(indices)


class OwnState(Sampler):
    """Draws from what no generator argument shows, and counts its epochs itself."""

    def __init__(self):
        self.draws, self.epoch = np.random.default_rng(3), 0

    def __iter__(self):
        self.epoch += 1
        return iter([self.epoch % 23, *self.draws.permutation(23).tolist()])  # not lazy

    def __len__(self):
        return 24


class Eager(BatchSampler):
    """Draws when iteration begins, not at its first batch; epochs differ in length."""

    def __init__(self, generator):
        self.generator, self.epochs = generator, 0

    def __iter__(self):
        count = int(torch.randint(2, 6, (), generator=self.generator))
        return iter(torch.randint(0, 23, (count, 3), generator=self.generator).tolist())

    def __len__(self):
        return 3


def nothing(worker):
    """A worker_init_fn."""


def as_list(items):
    return list(items)


def shuffled(**options):
    return DataLoader(DATA, batch_size=4, shuffle=True, generator=generator(), **options)


def eager(**options):
    drawn = generator()
    return DataLoader(DATA, batch_sampler=Eager(drawn), generator=drawn, **options)


IN_ORDER = needs_torch("2.6", "DataLoader(in_order=)")
ARGUMENTS = {
    "dataset": [
        lambda: DataLoader(ManyAtOnce(), batch_size=4, collate_fn=lambda batch: batch),
        lambda: DataLoader(list(range(9)), batch_size=2),
    ],
    "batch_size": [lambda: DataLoader(DATA), lambda: DataLoader(DATA, batch_size=23)],
    "shuffle": [shuffled, lambda: DataLoader(DATA, shuffle=False)],
    "sampler": [
        lambda: DataLoader(DATA, batch_size=5, sampler=OwnState()),
        lambda: DataLoader(DATA, batch_size=5, sampler=[3, 1, 4, 1, 5, 9]),
        lambda: DataLoader(
            DATA, sampler=RandomSampler(DATA, num_samples=40, generator=generator())
        ),
        lambda: DataLoader(DATA, batch_size=5, sampler=OwnState(), num_workers=2),
    ],
    "batch_sampler": [
        lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2], [0, 0, 7]]),
        eager,
        lambda: eager(num_workers=1),
        lambda: eager(num_workers=1, persistent_workers=True),
    ],
    "num_workers": [lambda: shuffled(num_workers=2)],
    "collate_fn": [lambda: shuffled(collate_fn=as_list)],
    "pin_memory": [lambda: shuffled(pin_memory=True)],
    "drop_last": [lambda: shuffled(drop_last=True)],
    "timeout": [lambda: shuffled(num_workers=1, timeout=30)],
    "worker_init_fn": [lambda: shuffled(worker_init_fn=nothing)],  # without workers never called
    "multiprocessing_context": [lambda: shuffled(num_workers=1, multiprocessing_context="fork")],
    "generator": [shuffled],
    "prefetch_factor": [lambda: shuffled(num_workers=1, prefetch_factor=5)],
    "persistent_workers": [lambda: shuffled(num_workers=2, persistent_workers=True)],
    "pin_memory_device": [lambda: shuffled(pin_memory=True, pin_memory_device="cuda")],
    "in_order": [lambda: shuffled(in_order=False), lambda: shuffled(in_order=False, num_workers=1)],
}
# Torch 2.6 pins memory for a device that is not there, and fails.
PINNED = needs_torch("2.11", "pin_memory_device= without that device")
MARKS = {"in_order": IN_ORDER, "pin_memory_device": PINNED}


def test_every_argument_is_known():
    given = {*inspect.signature(DataLoader.__init__).parameters} - {"self"}
    assert set(ARGUMENTS) - given == ({"in_order"} if torch.__version__ < "2.6" else set())
    assert given <= set(ARGUMENTS)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=f"{name}-{number}", marks=MARKS.get(name, ()))
        for name, makes in ARGUMENTS.items()
        for number, make in enumerate(makes)
    ],
)
def test_every_argument_gives_the_loaders_batches_for_three_epochs(make):
    expected = plain_batches(make(), 3)
    loader = StepIndexedLoader(make())
    found = [loader.batch(step) for step in range(len(expected))]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Asked for again, in another order.
    steps = random.Random(0).choices(range(len(expected)), k=40)
    again = [loader.batch(step) for step in steps]
    torch.testing.assert_close(again, [expected[step] for step in steps], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: shuffled(num_workers=1, worker_init_fn=nothing), "worker_init_fn"),
        pytest.param(
            lambda: shuffled(num_workers=2, in_order=False), "in_order=False", marks=IN_ORDER
        ),
        (lambda: DataLoader(DATA, batch_size=None), "batch_size=None"),
    ],
)
def test_what_the_workers_alone_could_do_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        StepIndexedLoader(make())


def test_a_loader_with_an_iteration_of_its_own_is_refused():
    class Twice(DataLoader):
        def __iter__(self):
            return itertools.chain(super().__iter__(), super().__iter__())

    with pytest.raises(TypeError, match="Twice"):
        StepIndexedLoader(Twice(DATA))


def test_a_sampler_that_cannot_be_copied_is_refused_by_name():
    class Locked(Sampler):
        def __init__(self):
            self.lines = (line for line in range(3))

        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="Locked"):
        StepIndexedLoader(DataLoader(DATA, sampler=Locked()))


def test_the_given_loader_and_its_generator_are_left_alone():
    loader = shuffled()
    before = loader.generator.get_state()
    first = StepIndexedLoader(loader)
    first.batch(20)
    assert torch.equal(loader.generator.get_state(), before)
    assert same(StepIndexedLoader(loader).batch(3), first.batch(3))


def test_the_data_that_a_sampler_refers_to_is_not_copied():
    class Large(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return index

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    class Own(Sampler):
        def __init__(self, data):
            self.anything = data

        def __iter__(self):
            return iter(range(5, -1, -1))

    for sampler in (RandomSampler(Large(), generator=generator()), Own(Large())):
        loader = StepIndexedLoader(DataLoader(Large(), batch_size=2, sampler=sampler))
        assert sorted(torch.cat([loader.batch(step) for step in range(3)])) == list(range(6))


class Counting(Sampler):
    listed = 0

    def __init__(self, length, generator):
        self.length, self.generator = length, generator

    def __iter__(self):
        type(self).listed += 1
        yield from torch.randperm(self.length, generator=self.generator).tolist()

    def __len__(self):
        return self.length


def test_a_window_over_the_end_of_an_epoch_lists_no_epoch_anew():
    """As a run asks: a window of 8 steps from each step on, epochs of 6 and of 2 batches."""
    for length in (24, 8):
        Counting.listed = 0
        sampler = Counting(length, generator())
        loader = StepIndexedLoader(DataLoader(range(24), batch_size=4, sampler=sampler))
        for step in range(120):
            for ahead in range(8):
                loader.batch(step + ahead)
        assert Counting.listed == -(-127 * 4 // length)  # each once


def test_torchs_samplers_without_a_generator_are_addressed_at_once(monkeypatch):
    """A step of the 10,000th epoch: that one is listed, and the first, which tells how long all are."""
    drawn, draw = [], torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda *args, **options: drawn.append(args) or draw(*args, **options)
    )
    loader = StepIndexedLoader(DataLoader(range(1000), batch_size=4, shuffle=True))
    assert loader.batch(250 * 10_000).shape == (4,)
    assert 1 <= len(drawn) <= 4


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
