"""The theorem on the real code: random discontinuous, integer-valued and chaotic processes."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from picardopt import AdaptiveTolerance, ParallelPicardOptimizer, StepRelativeTolerance, step_rng
from tests.helpers.catalog import Jumpy
from tests.helpers.runs import Case, as_bytes, check_exact


class Chaotic(torch.optim.Optimizer):
    """A real-valued step that is nonlinear everywhere and jumps at zero."""

    def __init__(self, params: Iterable[Any], rate: float = 3.0) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p].setdefault("memory", torch.zeros_like(p))
                memory.mul_(0.5).add_(p.grad)
                p.copy_(torch.where(p > 0, torch.sin(group["rate"] * p), p / 2) + memory / 8)


@dataclass(frozen=True)
class Process:
    """A table of drifts by (step, cell of the parameters) under a discontinuous optimizer."""

    table: tuple[int, ...]
    coarse: int
    optimizer: str
    modulus: int
    branch: int
    draws: bool

    def build(self) -> tuple[nn.Parameter, torch.optim.Optimizer, Callable[[int], Tensor]]:
        weight = nn.Parameter(torch.tensor([5.0, -3.0, 11.0]))
        if self.optimizer == "Jumpy":
            base: Any = Jumpy([weight], modulus=self.modulus, branch=self.branch)
        else:
            base = Chaotic([weight], rate=self.modulus / 20)

        def closure(step: int) -> Tensor:
            weight.grad = None
            cell = int(torch.floor(weight.detach().sum() / self.coarse))
            row = 7 * step + 3 * cell + cell * step
            drift = torch.tensor([self.table[(row + i) % len(self.table)] for i in range(3)])
            if self.draws:
                drift = drift + torch.randint(-2, 3, (3,))
            loss = (weight * drift).sum()
            loss.backward()
            return loss

        return weight, base, closure

    def sequential(self, steps: int) -> list[Tensor]:
        weight, base, closure = self.build()
        trajectory = [weight.detach().clone()]
        for t in range(steps):
            with step_rng(0, t):
                closure(t)
                base.step()
            trajectory.append(weight.detach().clone())
        return trajectory


processes = st.builds(
    Process,
    table=st.lists(st.integers(-9, 9), min_size=1, max_size=6).map(tuple),
    coarse=st.sampled_from([1, 4, 50, 1000]),
    optimizer=st.sampled_from(["Jumpy", "Chaotic"]),
    modulus=st.integers(2, 97),
    branch=st.integers(1, 5),
    draws=st.booleans(),
)
options = st.fixed_dictionaries(
    {
        "window": st.integers(1, 9),
        "predictor": st.sampled_from(["hold", "coast"]),
        "total_steps": st.sampled_from([None, "horizon"]),
    }
)


@given(processes, st.integers(1, 14), options)
def test_exact_within_as_many_sweeps_as_steps(
    process: Process, steps: int, options: dict[str, Any]
) -> None:
    """After k sweeps at least k iterates are final, and they are the sequential ones."""
    if options["total_steps"]:
        options = {**options, "total_steps": steps}
    expected = process.sequential(steps)
    weight, base, closure = process.build()
    optimizer = ParallelPicardOptimizer(base, tolerance=0, audit="never", **options)
    for t in range(steps):
        optimizer.step(closure)
        assert torch.equal(as_bytes(weight), as_bytes(expected[t + 1])), f"step {t}"
        assert optimizer.stats.sweeps <= optimizer.stats.steps == t + 1
    stats = optimizer.stats
    assert all(
        1 <= stride <= max(1, len(residuals)) <= options["window"]
        for stride, residuals in zip(stats.strides, stats.residuals, strict=True)
    )
    assert sum(stats.strides[:-1]) < steps <= sum(stats.strides)
    if options["window"] == 1:
        assert stats.strides == [1] * steps
    if options["total_steps"]:
        assert sum(stats.strides) == steps
        assert stats.drift_evaluations == steps + stats.wasted_evaluations


@settings(max_examples=30)
@given(
    processes,
    st.integers(1, 12),
    options,
    st.sampled_from([1e-3, 50.0, float("inf"), "adaptive", "relative"]),
)
def test_every_rule_makes_progress_and_keeps_the_head_honest(
    process: Process, steps: int, options: dict[str, Any], rule: Any
) -> None:
    """Whatever is accepted, a sweep's first step is one real step from where the run stands."""
    rules = {"adaptive": AdaptiveTolerance(initial=1.0), "relative": StepRelativeTolerance(5.0)}
    options = {**options, "total_steps": steps if options["total_steps"] else None}
    weight, base, closure = process.build()
    optimizer = ParallelPicardOptimizer(
        base, tolerance=rules.get(rule, rule), audit="never", **options
    )
    twin_weight, twin, twin_closure = process.build()
    for t in range(steps):
        sweeps = optimizer.stats.sweeps
        with torch.no_grad():
            twin_weight.copy_(weight)
        twin.load_state_dict(_state(optimizer))
        optimizer.step(closure)
        if optimizer.stats.sweeps > sweeps:
            with step_rng(0, t):
                twin_closure(t)
                twin.step()
            assert torch.equal(as_bytes(weight), as_bytes(twin_weight))
    assert optimizer.stats.sweeps <= steps
    assert min(optimizer.stats.strides) >= 1


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    # Copied: torch's load_state_dict keeps the tensors that it is given.
    return copy.deepcopy({"state": state["state"], "param_groups": state["param_groups"]})


@pytest.mark.parametrize("predictor", ["hold", "coast"])
@pytest.mark.parametrize("window", [2, 4, 9])
def test_integer_valued_training(window: int, predictor: Any) -> None:
    """A fixed case of the above that is known to accept more than one step a sweep."""
    check_exact(Case("integers", "Jumpy", steps=30), window=window, predictor=predictor)


def test_the_window_of_three_of_the_supplement() -> None:
    """Supplement C on the real code: slide by one, by two, or by the whole window of three."""
    for drifts, stride in [((3, 1, 1), 1), ((1, 2, 5), 2), ((1, 1, 1), 3), ((1, 1, 9), 3)]:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD([weight], lr=1.0), window=3, tolerance=4.0, predictor="hold"
        )

        def closure(
            step: int, weight: nn.Parameter = weight, drifts: tuple[int, ...] = drifts
        ) -> Tensor:
            weight.grad = None
            loss = -(weight * (drifts[step] if step < 3 else 0)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.stats.strides == [stride]
        assert optimizer.stats.tolerances == [[4.0] * 3]
        total = [sum(drifts[: j + 1]) ** 2 for j in range(3)]
        assert optimizer.stats.residuals == [pytest.approx(total)]
