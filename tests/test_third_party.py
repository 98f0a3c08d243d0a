"""Published optimizers: exact, or refused with the reason; and state that nobody can put back is found out."""

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, UnsupportedOptimizerError, step_rng
from picardopt.compat import accelerator
from tests.helpers.catalog import HIDDEN
from tests.helpers.optimizer_table import (
    LONG,
    TABLE,
    Verdict,
    alone,
    check,
    headings,
    judge,
    made,
    read_table,
    wrapped,
)
from tests.helpers.runs import (
    Case,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    parallel,
    sequential,
    wrap,
)
from tests.helpers.third_party import (
    QUICK,
    Entry,
    entries,
    imported,
    needs_all,
    shapes,
    surroundings,
)
from tests.helpers.versions import needs_package

quick = [entry for entry in entries() if QUICK.fullmatch(entry.name)]
LARGE = ("pytorch_optimizer.", "torch_optimizer.")
"""Packages of which a third is run daily."""
daily = [each for at, each in enumerate(quick) if at % 3 == 0 or not each.name.startswith(LARGE)]
rest = [entry for entry in entries() if entry not in daily]
EVERYONE = [*daily, *(pytest.param(entry, marks=pytest.mark.slow) for entry in rest)]


def listed(entry: Entry) -> Verdict:
    return read_table()[entry.name]


@needs_all
def test_the_table_lists_what_these_packages_export() -> None:
    """Every optimizer of every package, at the versions that run; no other."""
    assert list(read_table()) == [entry.name for entry in entries()]
    assert re.findall("^## (?!S).*", TABLE.read_text(), re.MULTILINE) == headings()
    words = [verdict.word for verdict in read_table().values()]
    assert words.count("exact") > 200
    assert f"{len(words)} optimizers: {words.count('exact')} exact" in TABLE.read_text()


@pytest.mark.parametrize("entry", EVERYONE, ids=lambda entry: entry.name)
def test_the_table_is_true(entry: Entry) -> None:
    """Bitwise at tolerance 0 with several strides longer than 1, or refused with that reason."""
    if listed(entry).word == "fails alone" and accelerator():
        pytest.skip("it may run on this machine")
    verdict = judge(entry, pace=False)
    assert verdict.word == listed(entry).word
    if verdict.word == "refused":
        assert verdict.last == listed(entry).last


@pytest.mark.slow
@pytest.mark.parametrize(("predictor", "window"), [("hold", 2), ("coast", 7)])
@pytest.mark.parametrize("entry", quick, ids=lambda entry: entry.name)
def test_other_windows(entry: Entry, predictor: str, window: int) -> None:
    if listed(entry).word != "exact":
        pytest.skip(f"it is listed as {listed(entry).word}")
    with surroundings(entry):
        expected = alone(*made(entry))
        got = wrapped(*made(entry), tolerance=0, predictor=predictor, window=window)
    check(got, expected, ahead=1 if window == 2 else 2)


@pytest.mark.slow
@pytest.mark.parametrize("entry", quick, ids=lambda entry: entry.name)
def test_the_listed_pace(entry: Entry) -> None:
    """Near what the table says; other processors round differently, which can move a stride."""
    if listed(entry).word == "exact":
        with surroundings(entry):
            strides = wrapped(*made(entry), LONG).strides
        assert LONG / len(strides) == pytest.approx(float(listed(entry).last), abs=0.6)


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_hidden_state_is_found_out(name: str) -> None:
    """In a class, a module, a default argument, a closure, an iterator, a parameter's attribute: refused."""
    problem, optimizer, _ = wrap(Case("network", name), window=4)
    before = [p.detach().clone() for p in problem.parameters]
    closure = make_closure(problem, optimizer.zero_grad)
    with pytest.raises(
        UnsupportedOptimizerError, match=rf"base={name}: rolled out twice .* step 0"
    ):
        optimizer.step(closure)
    assert_same_bits([p.detach() for p in problem.parameters], before)
    assert optimizer.step_index == 0
    assert optimizer.stats.steps == 0


@pytest.mark.parametrize("name", ["InClosure", "InIterator"])
def test_a_window_of_one_runs_anything(name: str) -> None:
    case = Case("network", name)
    assert_same_trace(parallel(case, window=1), sequential(case))


def test_hidden_state_that_wakes_later_is_found_later() -> None:
    """The rollout is repeated in later sweeps too."""

    class Late(HIDDEN["InClosure"]):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            group["calls"] = group.get("calls", 0) + 1
            if group["calls"] > 6:
                return super().step(closure)
            return torch.optim.SGD.step(self, closure)

    problem = shapes()
    optimizer = ParallelPicardOptimizer(Late(problem.groups), window=4, tolerance=0)
    closure = make_closure(problem, optimizer.zero_grad)
    with pytest.raises(UnsupportedOptimizerError, match="rolled out twice"):
        for _ in range(20):
            optimizer.step(closure)
    assert optimizer.step_index == 6


class Pair(Tensor):
    """A tensor subclass that is made of two others, like quantized states, and can neither be copied nor cloned."""

    high: Tensor
    low: Tensor

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor) -> "Pair":
        made = Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)
        made.high, made.low = high, low
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["high", "low"], None

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function} on a Pair")


class Paired(torch.optim.SGD):
    """Momentum in a `Pair`, one part rewritten in place and the other replaced."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if "pair" not in self.state[p]:
                self.state[p]["pair"] = Pair(torch.zeros_like(p), torch.zeros_like(p))
            pair = self.state[p]["pair"]
            pair.high.mul_(0.5).add_(p.grad)
            pair.low = pair.low * 0.9 + p.grad * 0.1
            p.grad.copy_(pair.high + pair.low)
        return super().step(closure)


def test_state_in_a_tensor_subclass() -> None:
    problems = shapes(), shapes()
    expected = alone(Paired(problems[0].groups, lr=1e-3), problems[0])
    check(wrapped(Paired(problems[1].groups, lr=1e-3), problems[1], tolerance=0), expected)


@needs_package("optimi")
def test_stepping_inside_backward_is_refused() -> None:
    """Gradient release: a hook on each parameter steps as soon as its gradient is there."""
    optimi = imported("optimi")
    model = nn.Linear(3, 2)
    base = optimi.AdamW(model.parameters(), lr=1e-3, gradient_release=True)
    optimi.prepare_for_gradient_release(model, base)
    with pytest.raises(UnsupportedOptimizerError, match="steps inside backward"):
        ParallelPicardOptimizer(base)


def test_other_hooks_on_parameters_are_not() -> None:
    model = nn.Linear(3, 2)
    scale = 0.5
    model.weight.register_hook(lambda gradient: gradient * scale)
    model.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(scale))
    ParallelPicardOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@needs_package("schedulefree")
@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedule_free_with_validation_in_between(name: str, every: int) -> None:
    """eval() swaps the averaged parameters in and train() swaps them out again, with rounding."""

    def validating(base: Any, problem: Any, step: int) -> list[Tensor]:
        if step % every:
            return []
        base.eval()
        seen = [p.detach().clone() for p in problem.parameters]
        base.train()
        return seen

    kind, bits = getattr(imported("schedulefree"), name), []
    for ahead in (False, True):
        problem = shapes()
        base = kind(problem.parameters, lr=3e-3)
        base.train()
        optimizer: Any = ParallelPicardOptimizer(base, window=4, tolerance=0) if ahead else base
        closure, found = make_closure(problem, base.zero_grad), []
        for t in range(16):
            with contextlib.nullcontext() if ahead else step_rng(0, t):
                loss = optimizer.step(closure) if ahead else closure(t)
                if not ahead:
                    base.step()
            found += [loss.detach().clone(), *validating(base, problem, t)]
            found += [p.detach().clone() for p in problem.parameters]
        bits.append(found)
    assert_same_bits(bits[1], bits[0])
    if every > 1:
        assert max(optimizer.stats.strides) >= 2


@needs_package("schedulefree")
def test_schedule_free_in_eval_mode_raises_its_own_error() -> None:
    problem = shapes()
    base = imported("schedulefree").AdamWScheduleFree(problem.parameters, lr=1e-3)
    optimizer = ParallelPicardOptimizer(base, window=4)
    closure = make_closure(problem, base.zero_grad)
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step(closure)
    base.train()
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.step_index == 4
