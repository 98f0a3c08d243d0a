"""NumPy's global generator as picardopt reads and sets it: the same streams as by NumPy's own functions."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from picardopt import numpy_rng
from picardopt.numpy_rng import NumpyGenerator
from picardopt.rng import preserved_rng, seed_all

USES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "uniform": np.random.rand,
    "normal": np.random.randn,  # draws two and keeps one waiting
    "two normals": lambda: np.random.randn(2),
    "bytes": lambda: np.random.bytes(3000),
    "seed": lambda: np.random.seed(3),
}


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    with preserved_rng():
        yield


def stream() -> list[float]:
    return [*np.random.randn(3).tolist(), *np.random.rand(2).tolist()]


def test_the_memory_is_that_of_the_generator() -> None:
    np.random.seed(1)
    np.random.rand(5)
    state = np.random.get_state(legacy=False)["state"]
    memory = numpy_rng._memory()
    assert memory is not None
    assert memory[:-4] == state["key"].astype(np.uint32).tobytes()
    assert ctypes.c_int.from_buffer_copy(memory[-4:]).value == state["pos"]


@given(st.lists(st.sampled_from(sorted(USES)), max_size=6), st.integers(0, 2**32 - 1))
def test_a_state_gives_its_stream_again_whatever_was_drawn(uses: list[str], seed: int) -> None:
    generator = NumpyGenerator()
    generator.restore((seed, 1))
    np.random.seed([seed, 1])
    kept = []
    for use in uses:
        USES[use]()
        before = np.random.get_state(legacy=False)
        kept.append((generator.state(), stream()))
        np.random.set_state(before)
    for state, numbers in [*kept, *reversed(kept), *kept]:
        generator.restore(pickle.loads(pickle.dumps(state)))
        assert stream() == numbers
        generator.restore(state)
        assert stream() == numbers
        generator.restore(state)
        assert generator.state() is state or np.random.get_state(legacy=False)["has_gauss"]


def test_what_draws_nothing_keeps_its_seed_alone() -> None:
    generator = NumpyGenerator()
    generator.restore((1, 2))
    assert generator.state() == (1, 2)
    np.random.rand()
    assert isinstance(generator.state(), dict)


def test_another_kind_of_generator_is_read_each_time() -> None:
    before = get_bit_generator()
    set_bit_generator(np.random.PCG64(3))
    try:
        with preserved_rng():
            expected = stream()
        with preserved_rng():
            np.random.rand()
        assert stream() == expected
    finally:
        set_bit_generator(before)


def test_seeding_all_seeds_numpy_with_both_halves() -> None:
    seed_all((7 << 32) + 5)
    numbers = stream()
    np.random.seed([5, 7])
    assert stream() == numbers
