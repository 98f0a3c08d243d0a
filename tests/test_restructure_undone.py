"""A change of structure that fails is undone, whatever its function reaches."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from picardopt import ParallelPicardOptimizer, Restructure
from tests.helpers.runs import assert_same_bits
from tests.helpers.splats import EVERY, build, due


def test_a_function_that_raises_undoes_the_step_and_leaves_the_object_usable() -> None:
    splats, optimizers, restructure = build()
    failing = [True]

    def function(step: int) -> Any:
        if failing:
            raise RuntimeError("planted")
        return restructure.function(step)

    optimizer = ParallelPicardOptimizer(
        list(optimizers.values()),
        window=4,
        tolerance=0,
        seed=3,
        carry=splats,
        restructure=Restructure(function, due),
    )
    for _ in range(EVERY - 1):
        optimizer.step(splats.closure)
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(splats.closure)
    assert optimizer.step_index == optimizer.stats.steps == EVERY - 1
    failing.clear()
    for _ in range(EVERY + 1):
        optimizer.step(splats.closure)
    assert len(splats.means) > 6


def doubled(splats: Any, base: torch.optim.Optimizer) -> torch.Tensor:
    """Doubles the points, in a module or a dict, and in their optimizer."""
    parents = torch.arange(4).repeat(2)
    old = splats["points"]
    new = splats["points"] = torch.nn.Parameter(old.detach()[parents])
    base.state[new] = {
        k: v[parents] if v.shape == old.shape else v for k, v in base.state.pop(old).items()
    }
    base.param_groups[0]["params"] = [new]
    return parents


@dataclass
class Lists:
    """As gsplat keeps them: parameters in a dict, statistics in another, here with a list of them too."""

    parameters: dict[str, torch.nn.Parameter]
    statistics: dict[str, torch.Tensor]
    history: list[torch.nn.Parameter]
    calls: Counter[str]


def reaching(
    held: str, lists: Lists, base: torch.optim.Optimizer, failing: list[bool]
) -> Callable[[int], torch.Tensor]:
    """A function that changes the dicts and the lists, which it reaches in one of three ways."""
    parameters, statistics = lists.parameters, lists.statistics
    history, calls = lists.history, lists.calls

    def split(parameters: Any, statistics: Any, history: Any, calls: Any) -> torch.Tensor:
        parents = doubled(parameters, base)
        statistics["seen"], statistics["new"] = torch.zeros(8), torch.zeros(8)
        calls["split"] += 1
        history.append(parameters["points"])
        if failing:
            raise KeyboardInterrupt
        return parents

    class Held:
        def __init__(self) -> None:
            self.parameters, self.statistics, self.history = parameters, statistics, history
            self.calls = calls

        def __call__(self, step: int) -> torch.Tensor:
            return split(self.parameters, self.statistics, self.history, self.calls)

    functions: dict[str, Callable[[int], torch.Tensor]] = {
        "captured": lambda step: split(parameters, statistics, history, calls),
        "an attribute": Held(),
        "of a dataclass": lambda step: split(
            lists.parameters, lists.statistics, lists.history, lists.calls
        ),
    }
    return functions[held]


@pytest.mark.parametrize("held", ["captured", "an attribute", "of a dataclass"])
def test_a_failed_step_puts_back_the_parameters_that_a_dict_or_a_list_holds(held: str) -> None:
    points = torch.nn.Parameter(torch.zeros(4))
    parameters, statistics = {"points": points}, {"seen": torch.zeros(4)}
    history, calls, failing = [points], Counter({"never": 0}), [True]
    base = torch.optim.Adam([points], lr=0.1)
    function = reaching(held, Lists(parameters, statistics, history, calls), base, failing)
    optimizer = ParallelPicardOptimizer(
        [base], window=4, tolerance=0, restructure=Restructure(function, lambda step: step == 2)
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameters["points"] - torch.rand(())).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    before = (parameters["points"], statistics["seen"])
    bits = before[0].detach().clone()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert list(parameters) == ["points"]
    assert list(statistics) == ["seen"]
    assert (parameters["points"], statistics["seen"]) == before
    assert len(history) == 1
    assert calls == {"never": 0}
    assert history[0] is base.param_groups[0]["params"][0] is parameters["points"]
    assert_same_bits(parameters["points"].detach(), bits)
    failing.clear()
    for _ in range(3):
        optimizer.step(closure)
    assert len(parameters["points"]) == len(statistics["seen"]) == 8


SPLATS: dict[str, torch.nn.Parameter] = {}
BASES: list[torch.optim.Optimizer] = []
"""What a script's own functions use."""
FAILING: list[bool] = []


def split_in(splats: Any, bases: Any) -> torch.Tensor:
    """Doubles the points and fails afterwards, if that is asked for."""
    (parents,) = [doubled(splats, base) for base in bases]
    if FAILING:
        raise RuntimeError("planted")
    return parents


@torch.no_grad()
def split_of_a_script(step: int) -> torch.Tensor:
    return split_in(SPLATS, BASES)


def split_by_a_helper(step: int) -> torch.Tensor:
    (parents,) = [split_of_a_script(step) for _ in range(1)]
    return parents


def split_in_a_comprehension(step: int) -> torch.Tensor:
    (parents,) = [split_in(SPLATS, BASES) for _ in range(1)]
    return parents


class Runner:
    """As in gsplat's trainer: a plain object with a module, whose method adds and removes."""

    def __init__(self, splats: Any, bases: Any) -> None:
        self.splats, self.bases = splats, bases

    def densify(self, step: int) -> torch.Tensor:
        return split_in(self.splats, self.bases)

    def of_a_script(self, step: int) -> torch.Tensor:
        return split_of_a_script(step)

    def __call__(self, step: int) -> torch.Tensor:
        return split_of_a_script(step)


class Holding:
    """A plain object that holds something under a name."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def densify(self, step: int) -> torch.Tensor:
        held = self.held[0] if isinstance(self.held, list) else self.held
        return split_in(*(held.values() if isinstance(held, dict) else held))


FUNCTIONS: dict[str, Callable[[Any, Any], Callable[[int], torch.Tensor]]] = {
    "a method": lambda splats, bases: Runner(splats, bases).densify,
    "a captured object": lambda splats, bases: partial(_called, Runner(splats, bases)),
    "a captured tuple": lambda splats, bases: partial(_unpacked, (splats, bases)),
    "a tuple in an object": lambda splats, bases: Holding((splats, bases)).densify,
    "a dict in an object": lambda splats, bases: Holding({"s": splats, "b": bases}).densify,
    "tuples in a list": lambda splats, bases: Holding([(splats, bases)]).densify,
    "a script": lambda splats, bases: split_of_a_script,
    "a helper of a script": lambda splats, bases: split_by_a_helper,
    "a comprehension of a script": lambda splats, bases: split_in_a_comprehension,
    "a partial function of a script": lambda splats, bases: partial(split_of_a_script),
    "a method of a script": lambda splats, bases: Runner({}, []).of_a_script,
    "an object of a script": lambda splats, bases: Runner({}, []),
}


def _called(runner: Runner, step: int) -> torch.Tensor:
    return runner.densify(step)


def _unpacked(both: tuple[Any, Any], step: int) -> torch.Tensor:
    return split_in(*both)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict])
def test_a_failed_step_puts_back_whatever_the_function_reaches(kind: Any, function: str) -> None:
    FAILING.clear()
    splats = SPLATS if "script" in function else kind()
    splats["points"] = torch.nn.Parameter(torch.zeros(4))
    base = torch.optim.Adam([splats["points"]], lr=0.1)
    BASES[:] = [base]
    optimizer = ParallelPicardOptimizer(
        [base],
        window=4,
        tolerance=0,
        restructure=Restructure(FUNCTIONS[function](splats, [base]), lambda step: step == 1),
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (splats["points"] - torch.rand(())).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = splats["points"]
    bits = before.detach().clone()
    FAILING[:] = [True]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.step(closure)
        assert splats["points"] is before is base.param_groups[0]["params"][0]
        assert_same_bits(before.detach(), bits)
    FAILING.clear()
    optimizer.step(closure)
    optimizer.step(closure)
    assert len(splats["points"]) == 8
