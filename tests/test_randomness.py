"""Law 3: step t's randomness is a function of (seed, t) alone, and is put back afterwards."""

import random

import numpy as np
import pytest
import torch

from picardopt import step_rng
from tests.helpers.runs import (
    Case,
    Trace,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    outside_streams,
    sequential,
    wrap,
)

CASE = Case("network", "Adam", steps=16)


def test_the_outer_streams_go_on_untouched() -> None:
    """Law 3: what a closure draws never shows outside, and the outside never shows inside."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    closure, trace = make_closure(problem, optimizer.zero_grad), Trace()
    for t in range(CASE.steps):
        torch.manual_seed(t)
        np.random.seed(t)
        random.seed(t)
        before = outside_streams()
        trace.record(optimizer.step(closure), problem, optimizer)
        assert_same_bits(outside_streams(), before)
    assert_same_trace(trace, expected)


def test_seed_one_is_not_the_shifted_stream_of_seed_zero() -> None:
    def stream(seed: int) -> set[tuple[float, float, float]]:
        drawn = set()
        for t in range(60):
            with step_rng(seed, t):
                drawn.add((float(torch.rand(())), float(np.random.rand()), random.random()))
        return drawn

    zero, one, again = stream(0), stream(1), stream(0)
    assert zero == again
    assert len(zero) == 60
    for index in range(3):
        assert not {draw[index] for draw in zero} & {draw[index] for draw in one}


def test_step_rng_restores_after_an_error() -> None:
    before = outside_streams()
    with pytest.raises(ValueError, match="planted"), step_rng(3, 4):
        raise ValueError(f"planted {torch.rand(5)} {np.random.rand()} {random.random()}")
    assert_same_bits(outside_streams(), before)
