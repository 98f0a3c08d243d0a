"""What a closure touches outside its optimizer: gradients of another one, averages of weights, a step of its own."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, PicardWarning


class Weighted:
    """A network, and a weight of its loss that an optimizer of its own trains."""

    def __init__(self, window: int = 3) -> None:
        torch.manual_seed(0)
        self.net, self.weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(()))
        base = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer = ParallelPicardOptimizer(base, window=window, tolerance=float("inf"))
        self.other = torch.optim.SGD([self.weight], lr=0.1)

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.net(torch.randn(4, 2)).square().mean() * torch.exp(-self.weight) + self.weight
        loss.backward()
        return loss


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_another_optimizer_cannot_step_on_gradients_of_the_future(kind: str) -> None:
    case = Weighted()

    def closure(step: int) -> Any:
        case.other.zero_grad()
        loss = case.loss()
        return {"loss": loss} if kind == "dict" else loss

    case.optimizer.step(closure)
    before = case.weight.detach().clone()
    with pytest.raises(ImpureClosureError, match=r"SGD.*parameter 0 .*\[a, b\]"):
        case.other.step()
    assert torch.equal(case.weight, before)
    assert case.optimizer.step_index == 1


def test_gradients_of_modules_that_ran_are_found_without_a_loss() -> None:
    case = Weighted()
    outside = nn.Linear(2, 2)
    other = torch.optim.SGD(outside.parameters(), lr=0.1)

    def closure(step: int) -> float:
        case.optimizer.zero_grad()
        loss = outside(case.net(torch.randn(4, 2))).square().mean()
        loss.backward()
        return loss.item()

    case.optimizer.step(closure)
    with pytest.raises(ImpureClosureError, match="may belong to another step"):
        other.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_another_optimizer_may_step_on_gradients_of_its_own(set_to_none: bool) -> None:
    """As in a GAN: what the closure left in the other network is cleared first."""
    case = Weighted()
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PicardWarning)
            case.optimizer.step(case.loss)
        case.other.zero_grad(set_to_none)
        (case.weight - 1).square().backward()
        case.other.step()
        case.other.step(lambda: case.other.zero_grad(set_to_none))
    assert 0 < case.weight < 1


def test_another_optimizer_may_step_where_nothing_runs_ahead() -> None:
    case = Weighted(window=1)
    for _ in range(3):
        case.other.zero_grad()
        case.optimizer.step(case.loss)
        case.other.step()
    assert case.weight < 0


@pytest.mark.parametrize("call", ["step", "step(closure)", "flush"])
def test_a_closure_that_takes_its_own_step_is_told_so(call: str) -> None:
    """Nothing has moved then, and the optimizer goes on with a closure that does not."""
    case = Weighted()

    def closure() -> Tensor:
        loss = case.loss()
        if call == "flush":
            case.optimizer.flush()
        else:
            case.optimizer.step(*[case.loss][: call != "step"])
        return loss

    before = case.net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"called step\(\) or flush\(\) of its own optimizer"):
        case.optimizer.step(closure)
    assert torch.equal(case.net.weight, before)
    assert case.optimizer.step_index == case.optimizer.stats.steps == 0
    case.optimizer.step(case.loss)
    assert case.optimizer.step_index == 1


def test_inference_mode_is_refused_and_leaves_nothing_behind() -> None:
    case = Weighted()
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            case.optimizer.step(case.loss)
        case.optimizer.flush()
        case.optimizer.step(case.loss)
    assert case.optimizer.step_index == 2


@pytest.mark.parametrize("where", ["cell", "attribute"])
def test_an_average_of_weights_that_the_closure_updates_is_named(where: str) -> None:
    """Evaluated ahead, and more than once per step, it would average guesses."""
    case = Weighted()
    average = torch.optim.swa_utils.AveragedModel(case.net)
    if where == "attribute":
        case.average = average  # type: ignore[attr-defined]

    def in_a_cell(step: int) -> Tensor:
        loss = case.loss()
        average.update_parameters(case.net)
        return loss

    def in_an_attribute(step: int) -> Tensor:
        loss = case.loss()
        case.average.update_parameters(case.net)  # type: ignore[attr-defined]
        return loss

    with pytest.raises(ImpureClosureError, match=r"AveragedModel\.module\.weight.*after step"):
        case.optimizer.step(in_a_cell if where == "cell" else in_an_attribute)
    assert case.optimizer.step_index == 0


def test_an_average_of_weights_that_the_loop_updates_is_fine() -> None:
    case = Weighted()
    average = torch.optim.swa_utils.AveragedModel(case.net)

    def closure(step: int) -> Tensor:
        assert average is not None
        return case.loss()

    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PicardWarning)
            case.optimizer.step(closure)
        average.update_parameters(case.net)
    assert average.n_averaged == 4
