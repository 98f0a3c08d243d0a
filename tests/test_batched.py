"""`picardopt.batched` outside of sweeps: an ordinary call, and what it refuses."""

import functools
import pickle
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from picardopt import BatchedCallError, batched
from picardopt.rng import RngState


def double(x: Tensor, scale: float = 2.0) -> Tensor:
    return x * scale


@dataclass(frozen=True)
class Pair:
    first: Tensor
    second: Tensor | None = None


class Model:
    size = 32

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @batched
    def predict(self, x: Tensor, *, offset: float = 0.0) -> Tensor:
        return x * self.scale + offset


def test_a_call_outside_a_sweep_is_the_functions_own() -> None:
    x = torch.arange(3.0)
    assert torch.equal(batched(double)(x), 2 * x)
    assert torch.equal(batched(double)(x, scale=3.0), 3 * x)


def test_it_decorates_methods_and_wraps_bound_ones_and_modules() -> None:
    x, linear = torch.ones(2, 4), nn.Linear(4, 4)
    assert torch.equal(Model(3.0).predict(x, offset=1.0), 3 * x + 1)
    assert torch.equal(batched(Model(3.0).predict)(x), 3 * x)
    got = batched(linear)(x)
    assert torch.equal(got, linear(x))
    assert not got.requires_grad
    assert batched(linear).in_features == 4
    assert torch.equal(batched(functools.partial(double, scale=4.0))(x), 4 * x)


def test_marked_twice_is_marked_once_and_pickles() -> None:
    once = batched(double)
    assert batched(once) is once
    assert torch.equal(pickle.loads(pickle.dumps(once))(torch.ones(1)), torch.full((1,), 2.0))
    with pytest.raises(TypeError, match="function=3"):
        batched(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f(x),
        lambda f, x: f([{"a": x}]),
        lambda f, x: f(Pair(x)),
        lambda f, x: f(x.detach(), scale=x),
    ],
    ids=["plain", "nested", "dataclass", "keyword"],
)
def test_gradients_that_would_flow_are_refused(call: Any) -> None:
    x = torch.ones(2, requires_grad=True)
    seen = batched(lambda x, scale=None: torch.zeros(2))
    with pytest.raises(BatchedCallError, match=r"argument '(x|scale)' requires a gradient"):
        call(seen, x)
    with torch.no_grad():
        call(seen, x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.randn(1),
        lambda x: x + float(np.random.rand()),
        lambda x: x + random.random(),
    ],
    ids=["torch", "numpy", "random"],
)
@pytest.mark.parametrize("waiting", [False, True])
def test_a_function_that_draws_is_refused_and_the_draw_undone(draw: Any, waiting: bool) -> None:
    np.random.seed(0)
    if waiting:  # a normal number, which NumPy draws in pairs
        np.random.randn()
    before = RngState.capture()
    batched(double)(torch.ones(2))
    with pytest.raises(BatchedCallError, match="drew random numbers"):
        batched(draw)(torch.ones(2))
    assert RngState.capture().same(before)


def test_a_function_that_changes_an_argument_is_refused() -> None:
    with pytest.raises(BatchedCallError, match="changed one of its arguments in place"):
        batched(lambda x: x.mul_(2))(torch.ones(2))
    with pytest.raises(BatchedCallError, match="changed one of its arguments in place"):
        batched(lambda x, table=None: table.add_(x))(torch.ones(2), table=torch.ones(2))


def test_arguments_and_results_are_rows() -> None:
    with pytest.raises(BatchedCallError, match="tensors of 2 and 3 rows"):
        batched(lambda x, y: x)(torch.ones(2), torch.ones(3))
    with pytest.raises(BatchedCallError, match="tensors of no rows"):
        batched(lambda: torch.ones(1))()
    with pytest.raises(BatchedCallError, match=r"returned a tensor of shape \(\) for 2 rows"):
        batched(lambda x: x.sum())(torch.ones(2))
    with pytest.raises(BatchedCallError, match=r"of shape \(3, 2\) for 2 rows"):
        batched(lambda x: Pair(x, torch.ones(3, 2)))(torch.ones(2))
    assert batched(lambda x, weight: x * weight)(torch.ones(2), torch.tensor(3.0)).tolist() == [
        3,
        3,
    ]
