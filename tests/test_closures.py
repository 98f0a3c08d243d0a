"""What a closure may look like: the step that it is handed, what it returns, and how long it lives."""

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, step_rng
from tests.helpers.regression import STEPS, Regression, sequential
from tests.helpers.runs import assert_same_bits
from tests.helpers.versions import needs_torch

# -- the step that it is handed -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("kind", ["required", "default", "positional", "keyword", "lambda"])
def test_a_parameter_called_step_receives_the_step(kind: str, window: int) -> None:
    """With a default too: else every step would train on step 0, without a word."""
    regression = Regression(window, tolerance=0)
    backward = regression.backward

    def required(step: int) -> Tensor:
        return backward(step)

    def default(step: int = 0) -> Tensor:
        return backward(step)

    def positional(step: int = 0, /) -> Tensor:
        return backward(step)

    def keyword(*, step: int = 0, scale: float = 1.0) -> Tensor:
        return scale * backward(step)

    closures = {"required": required, "default": default, "positional": positional}
    closures |= {"keyword": keyword, "lambda": lambda step=0: backward(step)}
    for _ in range(STEPS):
        regression.optimizer.step(closures[kind])
    assert_same_bits(regression.weights(), sequential(lambda each, step: each.backward(step)))


def test_a_step_that_was_bound_beforehand_stays() -> None:
    regression = Regression(1)
    for step in range(STEPS):
        regression.optimizer.step(
            functools.partial(lambda step: regression.backward(step), step=step)
        )
    assert_same_bits(regression.weights(), sequential(lambda each, step: each.backward(step)))


@pytest.mark.parametrize(
    "closure",
    [lambda t: None, lambda step, batch: None, lambda *, index: None],
    ids=["t", "two", "index"],
)
def test_another_required_parameter_is_named(closure: Any) -> None:
    regression = Regression()
    with pytest.raises(TypeError, match=r"required parameter '(t|batch|index)'.*called `step`"):
        regression.optimizer.step(closure)
    assert regression.optimizer.step_index == 0


# -- what it returns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned:
    loss: Tensor
    parts: dict[str, Tensor]
    name: str = "kept"


@dataclass(slots=True)
class Slotted:
    loss: Tensor
    parts: dict[str, Tensor]
    name: str = "kept"


@dataclass
class Nested:
    inside: Returned | Slotted


@pytest.mark.parametrize("kind", [Returned, Slotted])
def test_a_dataclass_in_a_dataclass_keeps_no_graph(kind: Any) -> None:
    regression = Regression()

    def closure(step: int) -> Nested:
        loss = regression.backward(step)
        return Nested(kind(loss, {"half": loss / 2}))

    for _ in range(4):
        inside = regression.optimizer.step(closure).inside
        assert type(inside) is kind
        assert inside.loss.grad_fn is None
        assert inside.parts["half"].grad_fn is None
        assert inside.name == "kept"


@pytest.mark.parametrize("kind", [Returned, Slotted])
def test_a_dataclass_keeps_no_graph(kind: Any) -> None:
    regression = Regression()

    def closure(step: int) -> Any:
        regression.base.zero_grad()
        loss = regression.loss(step)
        loss.backward()
        return kind(loss, {"half": loss / 2})

    returned = [regression.optimizer.step(closure) for _ in range(4)]
    for each in returned:
        assert type(each) is kind
        assert each.name == "kept"
        assert each.loss.grad_fn is None
        assert each.parts["half"].grad_fn is None
        assert torch.equal(each.parts["half"], each.loss / 2)


# -- its life ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
def test_an_optimizer_is_freed_with_its_last_reference(window: int) -> None:
    """No reference leads back to it: no collector is needed, and memory does not grow with its makings."""
    gc.disable()
    try:
        regression = Regression(window)
        for _ in range(4):
            regression.optimizer.step(regression.backward)
        dead = weakref.ref(regression.optimizer)
        speculator = weakref.ref(regression.optimizer._speculator)
        del regression.optimizer
        assert dead() is None
        assert speculator() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("audit", ["auto", "never"])
def test_autocast_around_step_sees_every_slots_own_values(audit: str) -> None:
    """Its cache of cast weights is keyed by tensor; the values of the tensors differ by slot."""

    def run(window: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), window=window, tolerance=0, audit=audit
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 4)).float().sum()  # the same gradient everywhere
            loss.backward()
            return loss

        losses = []
        for _ in range(12):
            with torch.autocast("cpu"):
                losses.append(optimizer.step(closure))
        return model.weight.detach().clone(), losses

    assert_same_bits(run(4), run(1))


class Transposed:
    """Sets a gradient that lies in memory column by column, as `torch.autograd.grad` may return it."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(37, 53))
        self.base = make([self.weight])

    def closure(self, step: int) -> Tensor:
        drawn = torch.randn(53, 64) @ torch.randn(64, 37)
        self.weight.grad = (drawn + self.weight.detach().sign().t()).t()
        return drawn.sum()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("Adafactor", {}, marks=needs_torch("2.5", "Adafactor")),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("Adam", {}),
    ],
)
def test_a_gradient_keeps_its_order_in_memory(name: str, options: dict[str, Any]) -> None:
    make = functools.partial(getattr(torch.optim, name), lr=1e-4, **options)
    plain, ahead = Transposed(make), Transposed(make)
    optimizer = ParallelPicardOptimizer(ahead.base, window=3, tolerance=0)
    for step in range(8):
        with step_rng(0, step):
            plain.closure(step)
            plain.base.step()
        optimizer.step(ahead.closure)
        assert_same_bits(ahead.weight, plain.weight)
        for key, value in plain.base.state[plain.weight].items():
            assert_same_bits(ahead.base.state[ahead.weight][key], value)
        assert ahead.weight.grad is not None
        assert ahead.weight.grad.stride() == (1, 37)
    assert optimizer.stats.sweeps < 8
