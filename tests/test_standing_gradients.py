"""What becomes of gradients that stand in ``.grad`` before a closure runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, step_rng
from tests.helpers.regression import STEPS, Regression, sequential
from tests.helpers.runs import assert_same_bits


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("tolerance", [0, None])
def test_micro_batches_in_the_loop_are_refused(tolerance: Any, window: int) -> None:
    """One backward in the loop, one in the closure: torch adds them up, a step run ahead could not."""
    regression = Regression(window, tolerance=tolerance)

    def closure(step: int) -> Tensor:
        loss = regression.loss(step + 1000)
        loss.backward()
        return loss

    before = regression.weights()
    regression.base.zero_grad()
    regression.loss(0).backward()
    with pytest.raises(
        ImpureClosureError, match=r"parameter 0 has a gradient in \.grad.*zero_grad"
    ):
        regression.optimizer.step(closure)
    assert_same_bits(regression.weights(), before)
    assert regression.optimizer.step_index == 0
    for _ in range(3):  # the first remedy
        regression.optimizer.step(regression.backward)


@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_that_never_clears_is_refused_before_it_adds_up(window: int) -> None:
    regression = Regression(window, tolerance=float("inf"))

    def closure(step: int) -> Tensor:
        loss = regression.loss(step)
        loss.backward()
        return loss

    regression.optimizer.step(closure)  # right: nothing stood before it
    first = regression.weights()
    with pytest.raises(ImpureClosureError, match="adds to it"):
        regression.optimizer.step(closure)
    assert_same_bits(regression.weights(), first)


@pytest.mark.parametrize("tolerance", [0, 1e-4])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    "clears", [lambda step: step % 3 == 0, lambda step: step < 6], ids=["every third", "early"]
)
def test_a_closure_that_clears_at_some_steps_only_is_refused(
    clears: Callable[[int], bool], window: int, tolerance: float
) -> None:
    """Ordinary accumulation over steps: no number of another run may come of it without a word."""
    regression, expected = Regression(window, tolerance=tolerance), Regression(0)

    def closure_of(each: Regression) -> Callable[[int], Tensor]:
        def closure(step: int) -> Tensor:
            if clears(step):
                each.base.zero_grad()
            loss = each.loss(step)
            loss.backward()
            return loss

        return closure

    closure, plain = closure_of(regression), closure_of(expected)
    with pytest.raises(ImpureClosureError, match="adds to it"):
        for step in range(STEPS):
            regression.optimizer.step(closure)
            with step_rng(0, step):
                plain(step)
                expected.base.step()
            if tolerance == 0:
                assert_same_bits(regression.weights(), expected.weights())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_a_loop_that_clears_is_as_good(window: int, set_to_none: bool) -> None:
    """``zero_grad`` in the loop: what stands is None, or zeros that the closure adds to."""

    def accumulate(regression: Regression, step: int) -> Tensor:
        loss = regression.loss(step)
        loss.backward()
        return loss

    regression = Regression(window, tolerance=0)
    for _ in range(STEPS):
        regression.optimizer.zero_grad(set_to_none=True)
        regression.optimizer.step(lambda step: accumulate(regression, step))

    def plain(each: Regression, step: int) -> None:
        each.base.zero_grad(set_to_none=True)
        accumulate(each, step)

    assert_same_bits(regression.weights(), sequential(plain))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_that_clears_may_find_anything(window: int, set_to_none: bool) -> None:
    regression = Regression(window, tolerance=0)

    def closure(step: int) -> Tensor:
        regression.base.zero_grad(set_to_none=set_to_none)
        loss = regression.loss(step)
        loss.backward()
        return loss

    for _ in range(STEPS):
        for p in regression.model.parameters():
            p.grad = torch.full_like(p, 7.0)
        regression.optimizer.step(closure)

    assert_same_bits(regression.weights(), sequential(lambda each, step: each.backward(step)))


def test_a_parameter_that_the_closure_does_not_train_may_stay_uncleared() -> None:
    """It has no gradient, neither before nor behind the closure."""
    torch.manual_seed(0)
    model, unused = nn.Linear(3, 1), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    optimizer = ParallelPicardOptimizer(base, window=3)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.randn(4, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(unused, torch.ones(2))
    unused.grad = torch.ones(2)
    with pytest.raises(ImpureClosureError, match=r"parameter 2 has a gradient in \.grad"):
        optimizer.step(closure)


def test_a_closure_that_only_returns_a_loss_is_refused_by_name() -> None:
    """Legal in torch: the gradients were made before."""
    regression = Regression()
    regression.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) without a closure"):
        regression.optimizer.step(lambda: regression.loss(0).detach())


@pytest.mark.parametrize("window", [1, 4])
def test_clearing_in_place_gives_no_gradient_to_a_parameter_without_one(window: int) -> None:
    """Zeros in place of None would let weight decay move it, and would fail the check of purity."""
    used, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([used, unused], lr=0.1, weight_decay=0.1)
    optimizer = ParallelPicardOptimizer(base, window=window, tolerance=0)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = used.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
        assert unused.grad is None
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_may_refuse_gradients_that_are_not_finite(window: int) -> None:
    """The test gradients that it adds to must not end a run whose loop clears the true ones."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1), window=window)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
        return loss

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
    with pytest.raises(ImpureClosureError, match="adds to it"):
        optimizer.step(closure)
    assert optimizer.step_index == 3


def test_an_error_before_the_gradients_are_cleared_is_the_closures_own() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1), window=4)

    def closure() -> Tensor:
        raise LookupError("no batch")

    for _ in range(2):
        with pytest.raises(LookupError, match="no batch"):
            optimizer.step(closure)
    assert torch.equal(parameter, torch.ones(3))


def test_closures_that_take_turns_are_each_tested_once() -> None:
    """A closure that does not clear costs a second evaluation, once: not at every sweep."""
    regression, calls = Regression(1), [0, 0]

    def first(step: int) -> Tensor:
        calls[0] += 1
        loss = regression.loss(step)
        loss.backward()
        return loss

    def second(step: int) -> Tensor:
        calls[1] += 1
        loss = 2 * regression.loss(step)
        loss.backward()
        return loss

    for turn in range(10):
        regression.optimizer.zero_grad()
        regression.optimizer.step((first, second)[turn % 2])
    assert calls == [6, 6]
