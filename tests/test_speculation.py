"""Laws 4 and 5: nothing speculative leaks; a bad future is not an error, a bad present is."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picardopt import (
    AdaptiveTolerance,
    NonFiniteGradientError,
    ParallelPicardOptimizer,
    PicardWarning,
    step_rng,
)
from tests.helpers.problems import Problem
from tests.helpers.runs import (
    Case,
    Trace,
    as_bytes,
    assert_same_bits,
    assert_same_trace,
    finish,
    make_closure,
    outside_streams,
    quiet,
    sequential,
    stats_of,
    wrap,
)

CASE = Case("network", "Adam", steps=16)
Closure = Callable[[int], Tensor]


def at(expected: Trace, step: int) -> tuple[Any, Any]:
    """Parameters and state as they are when ``step`` steps are committed (at least 1)."""
    return expected.parameters[step - 1], expected.states[step - 1]


def assert_stands_at(problem: Problem, optimizer: Any, expected: Trace, step: int) -> None:
    parameters, states = at(expected, step)
    assert optimizer.step_index == optimizer.stats.steps == step
    assert_same_bits([p.detach() for p in problem.parameters], parameters, "parameters")
    got = optimizer.state_dict()
    assert_same_bits({key: got[key] for key in states}, states, "state")


# --- A bad present ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, AssertionError])
@pytest.mark.parametrize("bad", [1, 4, 5, 6, 7])
def test_an_error_at_the_head_leaves_the_last_commit(bad: int, error: Any) -> None:
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    healthy = make_closure(problem, optimizer.zero_grad)
    armed = True

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        if armed and step == bad:
            raise error("planted")
        return loss

    trace = Trace()
    before = outside_streams()
    with quiet(), pytest.raises(error, match="planted") as caught:  # seen from afar first
        finish(problem, optimizer, closure, trace, CASE.steps)
    assert any(entry.name == "closure" for entry in caught.traceback)
    committed = len(trace.losses)
    # Ctrl-C interrupts wherever it strikes; an error waits until the step is the present one.
    assert committed == bad if issubclass(error, Exception) else committed <= bad
    if committed:
        assert_stands_at(problem, optimizer, expected, committed)
    assert_same_bits(outside_streams(), before)
    armed = False
    with quiet():
        finish(problem, optimizer, closure, trace, CASE.steps - committed)
    assert_same_trace(trace, expected)


def test_an_error_at_the_very_first_step() -> None:
    problem, optimizer, _ = wrap(CASE, window=4)
    before = [p.detach().clone() for p in problem.parameters]

    def closure(step: int) -> Tensor:
        raise LookupError(f"no data for step {step}")

    with pytest.raises(LookupError, match="no data for step 0"):
        optimizer.step(closure)
    assert_same_bits([p.detach() for p in problem.parameters], before)
    assert optimizer.step_index == 0
    assert not optimizer.state
    trace = Trace()
    finish(problem, optimizer, make_closure(problem, optimizer.zero_grad), trace, CASE.steps)
    assert_same_trace(trace, sequential(CASE))


def spoil(problem: Problem, value: float) -> None:
    """Puts one non-finite entry into the gradient."""
    gradient = problem.parameters[0].grad
    assert gradient is not None
    gradient.view(-1)[3] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bad", [1, 4, 6])
def test_a_nonfinite_gradient_at_the_head_raises(bad: int, value: float) -> None:
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    healthy = make_closure(problem, optimizer.zero_grad)
    armed = True

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        if armed and step == bad:
            spoil(problem, value)
        return loss

    trace = Trace()
    with quiet(), pytest.raises(NonFiniteGradientError, match=f"step {bad}"):
        finish(problem, optimizer, closure, trace, CASE.steps)
    assert len(trace.losses) == bad
    assert_stands_at(problem, optimizer, expected, bad)
    armed = False
    finish(problem, optimizer, closure, trace, CASE.steps - bad)
    assert_same_trace(trace, expected)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("bad", [{0}, {5}, {4, 5}, {1, 6, 7, 12}])
def test_a_nonfinite_step_can_be_skipped(bad: set[int], window: int) -> None:
    """nonfinite="skip": t advances, the base is untouched, the rest is as without that step."""
    problem, base = CASE.build()
    healthy = make_closure(problem, base.zero_grad)
    expected: list[Any] = []
    for t in range(CASE.steps):
        with step_rng(0, t):
            loss = healthy(t)
            if t not in bad:
                base.step()
        expected.append([loss.detach(), *[p.detach().clone() for p in problem.parameters]])
    state = base.state_dict()

    problem, optimizer, _ = wrap(CASE, window=window, nonfinite="skip")
    plain = make_closure(problem, optimizer.zero_grad)

    def closure(step: int) -> Tensor:
        loss = plain(step)
        if step in bad:
            spoil(problem, float("nan"))
        return loss

    with quiet():
        for t in range(CASE.steps):
            loss = optimizer.step(closure)
            got = [loss, *[p.detach() for p in problem.parameters]]
            assert_same_bits(got, expected[t], f"step {t}")
            assert optimizer.step_index == t + 1
    assert_same_bits({key: optimizer.state_dict()[key] for key in state}, state)
    if window > 1:
        assert max(optimizer.stats.strides) >= 2
        assert optimizer.stats.sweeps < CASE.steps


def test_a_nan_loss_with_finite_gradients_is_legal() -> None:
    """The trajectory does not depend on the loss; the user sees it as it is."""

    def poisoned(healthy: Closure) -> Closure:
        def closure(step: int) -> Tensor:
            loss = healthy(step)
            return loss * float("nan") if step % 3 == 0 else loss

        return closure

    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    trace = Trace()
    closure = poisoned(make_closure(problem, optimizer.zero_grad))
    finish(problem, optimizer, closure, trace, CASE.steps)
    for t, loss in enumerate(trace.losses):
        assert bool(loss.isnan()) == (t % 3 == 0)
    assert_same_bits(trace.parameters, expected.parameters)
    assert optimizer.stats.failed_speculations == 0


# --- A bad future -------------------------------------------------------------------------------


def only_at_wrong_guesses(
    expected: Trace, problem: Problem, healthy: Closure, harm: Callable[[int], None], first: int
) -> Closure:
    """A closure that does harm wherever the parameters are not those of the true trajectory."""

    def closure(step: int) -> Tensor:
        wrong = step >= first and not torch.equal(
            as_bytes(problem.parameters[0]), as_bytes(expected.parameters[step - 1][0])
        )
        loss = healthy(step)
        if wrong:
            harm(step)
        return loss

    return closure


@pytest.mark.parametrize("predictor", ["hold", "coast"])
@pytest.mark.parametrize("kind", ["raises", "nan", "inf"])
def test_a_bad_future_only_shortens_the_stride(kind: str, predictor: Any) -> None:
    """Counted, warned about once with its traceback, and never felt: the run is exact."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4, predictor=predictor)

    def harm(step: int) -> None:
        if kind == "raises":
            raise ZeroDivisionError("planted in the future")
        spoil(problem, float(kind))

    closure = only_at_wrong_guesses(
        expected, problem, make_closure(problem, optimizer.zero_grad), harm, first=1
    )
    trace = Trace()
    with pytest.warns(PicardWarning) as caught:
        finish(problem, optimizer, closure, trace, CASE.steps)
    assert_same_trace(trace, expected)
    assert optimizer.stats.failed_speculations >= 2
    assert len([w for w in caught if issubclass(w.category, PicardWarning)]) == 1
    if kind == "raises":
        message = str(caught[0].message)
        assert "planted in the future" in message
        assert "ZeroDivisionError" in message
        assert "in harm" in message  # the traceback's own frame


def test_a_rare_bad_future_leaves_longer_strides() -> None:
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)

    def harm(step: int) -> None:
        if step == 9:
            raise ZeroDivisionError("planted")

    closure = only_at_wrong_guesses(
        expected, problem, make_closure(problem, optimizer.zero_grad), harm, first=1
    )
    trace = Trace()
    with pytest.warns(PicardWarning, match="planted"):
        finish(problem, optimizer, closure, trace, CASE.steps)
    assert_same_trace(trace, expected)
    assert max(optimizer.stats.strides) == 4


def test_nan_never_enters_the_tolerance() -> None:
    """The paper's rule with NaN in the future: the threshold stays a number and goes on."""
    problem, optimizer, _ = wrap(
        Case("smooth", "Adam", steps=30),
        window=5,
        tolerance=AdaptiveTolerance(initial=1e-4),
        predictor="hold",
    )
    healthy = make_closure(problem, optimizer.zero_grad)
    evaluated: dict[int, int] = {}

    def closure(step: int) -> Tensor:
        evaluated[step] = evaluated.get(step, 0) + 1
        loss = healthy(step)
        if step % 4 == 3 and evaluated[step] == 1 and step > optimizer.step_index:
            spoil(problem, float("nan"))
        return loss

    with pytest.warns(PicardWarning):
        finish(problem, optimizer, closure, Trace(), 30)
    stats = stats_of(optimizer)
    assert stats["failed_speculations"] > 0
    assert all(0 <= value < 1 for values in stats["tolerances"] for value in values)
    assert 0 < optimizer.tolerance.value < 1
    for stride, residuals in zip(stats["strides"], stats["residuals"], strict=True):
        assert all(residual == residual for residual in residuals[: stride - 1])


@pytest.mark.parametrize("tolerance", [0, 1e-3, float("inf")])
def test_a_step_whose_drift_is_bad_is_never_committed_ahead(tolerance: float) -> None:
    """Even where every guess is accepted, a NaN drift is not: it waits until it is the head."""
    problem, optimizer, _ = wrap(Case("smooth", "Adam"), window=6, tolerance=tolerance)
    healthy = make_closure(problem, optimizer.zero_grad)

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        if step == 8:
            spoil(problem, float("nan"))
        return loss

    with pytest.warns(PicardWarning):
        finish(problem, optimizer, closure, Trace(), 8)
    assert all(bool(p.isfinite().all()) for p in problem.parameters)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step(closure)
    assert all(bool(p.isfinite().all()) for p in problem.parameters)


def test_an_interrupt_during_the_base_step_of_a_rollout() -> None:
    """Ctrl-C while the base runs ahead: state and parameters are those of the last commit."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    closure, trace = make_closure(problem, optimizer.zero_grad), Trace()
    finish(problem, optimizer, closure, trace, 6)
    base, calls = optimizer.base, 0
    honest = type(base).step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        value = honest(self, *args, **kwargs)
        if calls == 3:
            raise KeyboardInterrupt
        return value

    base.step = interrupted.__get__(base)
    with pytest.raises(KeyboardInterrupt):
        finish(problem, optimizer, closure, trace, 10)
    del base.step
    assert_stands_at(problem, optimizer, expected, len(trace.losses))
    finish(problem, optimizer, closure, trace, CASE.steps - len(trace.losses))
    assert_same_trace(trace, expected)


def test_what_a_speculation_leaves_in_gradients() -> None:
    """After a failed step no speculative gradient is left behind on any parameter."""
    problem, optimizer, _ = wrap(CASE, window=4)
    healthy = make_closure(problem, optimizer.zero_grad)

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        if step == 2:
            raise RuntimeError("planted")
        return loss

    expected = sequential(CASE)
    with pytest.warns(PicardWarning, match="planted"):
        finish(problem, optimizer, closure, Trace(), 2)
    assert isinstance(optimizer, ParallelPicardOptimizer)
    assert_same_bits([p.grad for p in problem.parameters], expected.gradients[1])
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(closure)
    assert_stands_at(problem, optimizer, expected, 2)


@pytest.mark.filterwarnings("ignore:running ahead failed")
def test_a_failure_ahead_holds_nothing_of_the_closure() -> None:
    """Most often it is out of memory: what it had made must be free before the next sweep, without the collector."""

    class Activations:
        pass

    parameter, made = torch.nn.Parameter(torch.ones(3)), []
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1), window=4)

    def closure(step: int) -> torch.Tensor:
        activations = Activations()
        made.append(weakref.ref(activations))
        if step == 2:
            raise MemoryError
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    gc.disable()
    try:
        optimizer.step(closure)
        assert len(made) > 2
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()
