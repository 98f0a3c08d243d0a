"""Runs of a problem, sequential and through the wrapper, and the comparison of their bits."""

import copy
import random
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picardopt import ParallelPicardOptimizer, PicardWarning, step_rng
from tests.helpers.catalog import make_optimizer, make_scheduler, torch_optimizers
from tests.helpers.problems import PROBLEMS, Problem

STATS = (
    "steps",
    "sweeps",
    "strides",
    "residuals",
    "tolerances",
    "drift_evaluations",
    "wasted_evaluations",
    "failed_speculations",
    "mean_stride",
)


SECONDS = 45.0
"""What "within seconds" may take on a crowded machine; the wrapper's own timeout is longer."""


@dataclass(frozen=True)
class Case:
    """One run, by names, so that it can be sent to a worker."""

    problem: str = "network"
    optimizer: str = "Adam"
    scheduler: str | None = None
    known: str = "base"
    """How the wrapper learns of the scheduler: built on the "base" and given, built on the
    "wrapper" and set afterwards, or "unknown" to it."""
    steps: int = 14
    seed: int = 0
    sample: tuple[Any, dict[str, Any]] | None = field(default=None, compare=False, repr=False)
    """The database's entry for ``optimizer``, looked up before the case goes to workers."""

    def build(self) -> tuple[Problem, torch.optim.Optimizer]:
        problem = PROBLEMS[self.problem]()
        return problem, make_optimizer(self.optimizer, problem.groups, self.sample)

    def packed(self) -> "Case":
        """This case with its database entry, so that workers need not load the database."""
        if ": " not in self.optimizer or self.optimizer.startswith("pypi: "):
            return self
        return replace(self, sample=torch_optimizers()[self.optimizer])


@dataclass
class Trace:
    """Everything that law 1 compares, after every step."""

    losses: list[Tensor] = field(default_factory=list)
    parameters: list[list[Tensor]] = field(default_factory=list)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict, compare=False)

    def record(self, loss: Tensor, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        self.losses.append(loss.detach().clone())
        self.parameters.append([p.detach().clone() for p in problem.parameters])
        self.gradients.append(
            [None if p.grad is None else p.grad.clone() for p in problem.parameters]
        )
        state = optimizer.state_dict()
        self.states.append(
            copy.deepcopy({"state": state["state"], "param_groups": state["param_groups"]})
        )
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def parts(self) -> dict[str, Any]:
        names = ("losses", "parameters", "gradients", "states", "rates")
        return {name: getattr(self, name) for name in names}


def differences(got: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Yields where two nested values differ in type, structure or bits."""
    if isinstance(expected, Tensor):
        if (
            not isinstance(got, Tensor)
            or got.dtype != expected.dtype
            or got.shape != expected.shape
        ):
            yield f"{path}: {got!r} is not like {expected!r}"
        elif not torch.equal(as_bytes(got), as_bytes(expected)):
            yield f"{path}: {got} != {expected}"
    elif isinstance(expected, dict):
        if not isinstance(got, dict) or list(got) != list(expected):
            yield f"{path}: keys {list(got)} != {list(expected)}"
        else:
            for key in expected:
                yield from differences(got[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple | deque):
        if len(got) != len(expected):
            yield f"{path}: {len(got)} entries, not {len(expected)}"
        for index, (a, b) in enumerate(zip(got, expected, strict=False)):
            yield from differences(a, b, f"{path}[{index}]")
    elif type(got) is type(expected) and hasattr(expected, "__dict__"):  # a projector, say
        yield from differences(vars(got), vars(expected), path)
    elif type(got) is not type(expected) or (
        got != expected and (got == got or expected == expected)
    ):
        yield f"{path}: {got!r} != {expected!r}"


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bits, so that NaN equals NaN and 0 differs from -0."""
    # A copy: a single element may have any stride, and then refuses to be seen as bytes.
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def assert_same_bits(got: Any, expected: Any, path: str = "") -> None:
    found = next(differences(got, expected, path), None)
    assert found is None, found


def assert_same_trace(got: Trace, expected: Trace) -> None:
    """Step by step, so that the message names the first step that went wrong."""
    assert len(got.losses) == len(expected.losses)
    for step in range(len(expected.losses)):
        for name, values in expected.parts().items():
            assert_same_bits(got.parts()[name][step], values[step], f"step {step}, {name}")


def make_closure(
    problem: Problem, zero_grad: Callable[[], None], seen: list[int] | None = None
) -> Callable[[int], Tensor]:
    """The ordinary closure: zero_grad, forward, backward."""

    def closure(step: int) -> Tensor:
        if seen is not None:
            seen.append(step)
        zero_grad()
        loss = problem.loss(step)
        loss.backward()
        problem.after_backward()
        return loss

    return closure


def sequential(case: Case) -> Trace:
    """The loop that a run at tolerance 0 equals bitwise."""
    problem, base = case.build()
    scheduler = make_scheduler(case.scheduler, base) if case.scheduler else None
    closure, trace = make_closure(problem, base.zero_grad), Trace()
    for t in range(case.steps):
        with step_rng(case.seed, t):
            for p in problem.parameters:
                p.grad = None
            loss = closure(t)
            base.step()
        if scheduler is not None:
            advance(scheduler, loss)
        trace.record(loss, problem, base)
    return trace


def wrap(case: Case, **options: Any) -> tuple[Problem, ParallelPicardOptimizer, Any]:
    """The problem, the wrapper at tolerance 0 and the scheduler (or None) of a case."""
    problem, base = case.build()
    options = {"tolerance": 0, "seed": case.seed, **options}
    scheduler = None
    if case.scheduler and case.known != "wrapper":
        scheduler = make_scheduler(case.scheduler, base)
        if case.known == "base":
            options["lr_scheduler"] = scheduler
    optimizer = ParallelPicardOptimizer(base, **options)
    if case.scheduler and case.known == "wrapper":
        scheduler = make_scheduler(case.scheduler, optimizer)
        optimizer.lr_scheduler = scheduler
    return problem, optimizer, scheduler


def parallel(case: Case, expect: Any = None, **options: Any) -> Trace:
    """The same run through the wrapper; options go to its constructor.

    Args:
        case: The run.
        expect: A context in which every call of ``step`` runs, such as ``pytest.warns``.
        options: For the wrapper; tolerance 0 and the case's seed if not given.
    """
    with expect or nullcontext():
        problem, optimizer, scheduler = wrap(case, **options)
        closure, trace = make_closure(problem, optimizer.zero_grad), Trace()
        for _ in range(case.steps):
            loss = optimizer.step(closure)
            if scheduler is not None:
                advance(scheduler, loss)
            trace.record(loss, problem, optimizer)
    trace.stats = stats_of(optimizer)
    return trace


def advance(scheduler: Any, loss: Tensor) -> None:
    """Steps a scheduler as a training loop does."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(loss.detach()))
    else:
        scheduler.step()


def stats_of(optimizer: ParallelPicardOptimizer) -> dict[str, Any]:
    """The counters of a run as plain values that can be sent between processes."""
    return {name: copy.deepcopy(getattr(optimizer.stats, name)) for name in STATS}


def assert_parallel(trace: Trace) -> None:
    """Not a window of 1 in disguise."""
    assert max(trace.stats["strides"]) >= 2, trace.stats["strides"]
    assert trace.stats["sweeps"] < trace.stats["steps"] == len(trace.losses)


def check_exact(case: Case, **options: Any) -> Trace:
    """Law 1 for one case on one process."""
    trace = parallel(case, **options)
    assert_same_trace(trace, sequential(case))
    assert_parallel(trace)
    return trace


def finish(
    problem: Problem, optimizer: Any, closure: Callable[..., Any], trace: Trace, steps: int
) -> None:
    """Takes ``steps`` more steps and records them."""
    for _ in range(steps):
        trace.record(optimizer.step(closure), problem, optimizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Lets the wrapper's own warning pass where a test is not about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        yield


def outside_streams() -> list[Any]:
    """States of the global generators that a user may draw from between steps."""
    return [
        torch.get_rng_state(),
        [int(word) for word in np.random.get_state()[1]],  # type: ignore[index]
        random.getstate(),
    ]


def attempt(trace: Trace, problem: Any, optimizer: Any, closure: Any, steps: int) -> dict[str, Any]:
    """Takes steps until something is raised, and tells what."""
    started = time.perf_counter()
    error: BaseException | None = None
    try:
        with quiet():
            finish(problem, optimizer, closure, trace, steps)
    except BaseException as caught:
        error = caught
    return {
        "error": type(error).__name__,
        "text": "" if error is None else "".join(traceback.format_exception(error)),
        "message": str(error),
        "seconds": time.perf_counter() - started,
        "committed": len(trace.losses),
        "step_index": optimizer.step_index,
    }
