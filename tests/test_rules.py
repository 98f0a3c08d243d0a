"""Tolerances and predictors, each against its definition recomputed from a run's own record."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, StepRelativeTolerance
from tests.helpers.problems import PROBLEMS
from tests.helpers.runs import Case, Trace, assert_same_bits, finish, make_closure, parallel, wrap

# --- Step-relative ------------------------------------------------------------------------------


def squared(a: list[Tensor], b: list[Tensor]) -> float:
    count = sum(x.numel() for x in a)
    return (
        sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
        / count
    )


@pytest.mark.parametrize("factor", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("predictor", ["hold", "coast"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD: momentum"])
def test_step_relative_is_the_running_mean_of_accepted_steps(
    optimizer: str, predictor: Any, factor: float
) -> None:
    """Initialized by the first sweep's head step, then fed by accepted steps only."""
    decay = 0.8
    case = Case("smooth", optimizer, steps=30)
    trace = parallel(
        case,
        window=5,
        predictor=predictor,
        total_steps=30,
        tolerance=StepRelativeTolerance(factor=factor, distance=0, decay=decay),
    )
    start = [p.detach() for p in PROBLEMS["smooth"]().parameters]
    points = [start, *trace.parameters]
    lengths = [squared(points[t + 1], points[t]) for t in range(case.steps)]
    mean, done = lengths[0], 0
    stats = trace.stats
    for stride, residuals, tolerances in zip(
        stats["strides"], stats["residuals"], stats["tolerances"], strict=True
    ):
        # Accepted iterates are committed ones, up to the residual that was let through.
        assert tolerances == pytest.approx([factor * mean] * len(residuals), rel=1e-4)
        first = next(
            (
                j
                for j, (r, e) in enumerate(zip(residuals, tolerances, strict=True), 1)
                if not r <= e
            ),
            len(residuals),
        )
        assert stride == first
        for length in lengths[done : done + stride]:
            mean = decay * mean + (1 - decay) * length
        done += stride
    assert done == case.steps
    if factor == 20.0:
        assert stats["mean_stride"] > 2


def test_distance_relative_where_that_is_more() -> None:
    """Far from the head a fraction of the squared distance is accepted, near it the step-relative part."""
    case = Case("smooth", "Adam", steps=24)
    rule = StepRelativeTolerance(factor=0.5, distance=0.3)
    trace = parallel(case, window=6, total_steps=24, tolerance=rule)
    start = [p.detach() for p in PROBLEMS["smooth"]().parameters]
    points = [start, *trace.parameters]
    mean, done = squared(points[1], points[0]), 0
    far = 0
    stats = trace.stats
    for stride, tolerances in zip(stats["strides"], stats["tolerances"], strict=True):
        for j, threshold in enumerate(tolerances[:stride], 1):
            # Iterates up to the stride are the committed ones.
            distance = squared(points[done + j], points[done])
            assert threshold == pytest.approx(max(0.5 * mean, 0.3 * distance), rel=1e-4)
            far += 0.3 * distance > 0.5 * mean
        for t in range(done, done + stride):
            mean = 0.9 * mean + 0.1 * squared(points[t + 1], points[t])
        done += stride
    assert far > 0
    assert max(stats["strides"]) >= 2


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_step_relative_needs_no_tuning_across_scales(scale: float) -> None:
    """Scaling loss and learning rate so that all iterates scale leaves every stride as it was."""

    def strides(scale: float) -> list[int]:
        weight = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64) * scale)
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD([weight], lr=0.1, momentum=0.5),
            window=6,
            tolerance=StepRelativeTolerance(0.05, distance=0),
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            noise = torch.randn(8, dtype=torch.float64)
            loss = (weight / scale - noise).square().mul(1 + noise.abs()).mean() * scale**2
            loss.backward()
            return loss

        for _ in range(30):
            optimizer.step(closure)
        return optimizer.stats.strides

    assert strides(scale) == strides(1.0)
    assert len(set(strides(1.0))) > 2


# --- Predictors ---------------------------------------------------------------------------------


def evaluation_points(
    optimizer: ParallelPicardOptimizer, parameters: list[nn.Parameter], closure: Any, steps: int
) -> dict[int, list[Tensor]]:
    """Where each step's loss was evaluated last."""
    points: dict[int, list[Tensor]] = {}

    def recording(step: int) -> Any:
        points[step] = [p.detach().clone() for p in parameters]
        return closure(step)

    for _ in range(steps):
        optimizer.step(recording)
    return points


@pytest.mark.parametrize("problem", ["network", "partial"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD: nesterov", "AdamW: nonzero weight_decay"])
def test_coast_is_the_base_stepped_on_with_zero_drifts(optimizer: str, problem: str) -> None:
    """None stays None: a parameter without a gradient coasts nowhere."""
    made, wrapper, _ = wrap(
        Case(problem, optimizer),
        window=4,
        tolerance=float("inf"),
        predictor="coast",
        audit="never",
    )
    closure = make_closure(made, wrapper.zero_grad)
    finish(made, wrapper, closure, Trace(), 4)
    assert wrapper.stats.strides == [4]
    twin, base = copy.deepcopy((made.parameters, wrapper.base))
    absent = [p.grad is None for p in made.parameters]
    points = evaluation_points(wrapper, made.parameters, closure, 4)
    assert wrapper.stats.strides == [4, 4]
    for step in range(4, 8):
        assert_same_bits(points[step], [p.detach() for p in twin], f"step {step}")
        for p, none in zip(twin, absent, strict=True):
            p.grad = None if none else torch.zeros_like(p)
        base.step()
    moved = [not torch.equal(points[4][i], points[7][i]) for i in range(len(twin))]
    assert any(moved)
    assert not any(m and a for m, a in zip(moved, absent, strict=True))


def test_hold_copies_the_tail() -> None:
    made, wrapper, _ = wrap(
        Case(), window=4, tolerance=float("inf"), predictor="hold", audit="never"
    )
    closure = make_closure(made, wrapper.zero_grad)
    finish(made, wrapper, closure, Trace(), 4)
    tail = [p.detach().clone() for p in made.parameters]
    points = evaluation_points(wrapper, made.parameters, closure, 4)
    for step in range(4, 8):
        assert_same_bits(points[step], tail)


class Normalized(torch.optim.Optimizer):
    """Divides by the gradient's norm: a zero drift gives 0 / 0, or an error if asked to."""

    def __init__(self, params: Iterable[Any], refuse: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        self.refuse = refuse

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if self.refuse and not p.grad.any():
                    raise RuntimeError("zero gradient")
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


@pytest.mark.parametrize("refuse", [False, True])
def test_a_guess_that_is_not_finite_becomes_hold(refuse: bool) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(
        Normalized([weight], refuse), window=3, tolerance=float("inf"), audit="never"
    )

    def closure(step: int) -> Tensor:
        assert bool(weight.isfinite().all())
        optimizer.zero_grad()
        loss = (weight * torch.randn(3)).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    tail = weight.detach().clone()
    points = evaluation_points(optimizer, [weight], closure, 3)
    for step in range(3, 6):
        assert torch.equal(points[step][0], tail)
    assert optimizer.stats.strides == [3, 3]
    assert optimizer.stats.failed_speculations == 0


def test_the_residual_decides_never_the_predictor() -> None:
    """At tolerance 0 both predictors give the same bits; only the strides may differ."""
    case = Case("network", "SGD: nesterov", steps=20)
    hold, coast = (parallel(case, window=5, predictor=predictor) for predictor in ("hold", "coast"))
    assert_same_bits(coast.parameters, hold.parameters)


def test_a_momentum_that_coasts_far_pays() -> None:
    """With gradients that are zero from some step on, coast is exact and hold is not."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def strides(predictor: Any) -> list[int]:
        with torch.no_grad():
            weight.fill_(1)
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD([weight], lr=0.1, momentum=0.9),
            window=4,
            tolerance=0,
            predictor=predictor,
        )

        def closure(step: int) -> Tensor:
            optimizer.zero_grad()
            loss = weight.sum() * (1.0 if step < 4 else 0.0)
            loss.backward()
            return loss

        for _ in range(20):
            optimizer.step(closure)
        return optimizer.stats.strides

    assert strides("coast").count(4) > strides("hold").count(4)
