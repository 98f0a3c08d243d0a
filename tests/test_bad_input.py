"""Bad input: a clear error that names the argument and the remedy, and nothing is lost."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import picardopt
from picardopt import (
    AdaptiveTolerance,
    ParallelPicardOptimizer,
    PicardError,
    StepRelativeTolerance,
)
from picardopt.errors import UnsupportedOptimizerError
from tests.helpers.runs import (
    Case,
    Trace,
    assert_same_bits,
    assert_same_trace,
    finish,
    make_closure,
    wrap,
)
from tests.helpers.runs import sequential as run_sequential

CASE = Case("network", "Adam", steps=12)


def base() -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("window", -2),
        ("window", 2.0),
        ("window", True),
        ("window", "4"),
        ("tolerance", -1e-6),
        ("tolerance", float("nan")),
        ("tolerance", "tight"),
        ("tolerance", True),
        ("tolerance", object()),
        ("predictor", "linear"),
        ("predictor", None),
        ("total_steps", 0),
        ("total_steps", 1.5),
        ("seed", 1.0),
        ("seed", None),
        ("seed", "0"),
        ("lr_scheduler", 0.1),
        ("process_group", "world"),
        ("process_group", 2),
        ("nonfinite", "ignore"),
        ("nonfinite", True),
        ("audit", "sometimes"),
        ("audit", None),
        ("timeout", 0),
        ("timeout", -1.0),
        ("timeout", float("nan")),
        ("timeout", "10"),
    ],
)
def test_each_wrong_argument_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        ParallelPicardOptimizer(base(), **{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    assert re.search(r"give|need|use|call", message), message


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        ParallelPicardOptimizer(base(), 4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (AdaptiveTolerance, {"initial": -1.0}, "initial"),
        (AdaptiveTolerance, {"initial": float("nan")}, "initial"),
        (AdaptiveTolerance, {"decay": 1.5}, "decay"),
        (AdaptiveTolerance, {"decay": float("nan")}, "decay"),
        (AdaptiveTolerance, {"statistic": "max"}, "statistic"),
        (StepRelativeTolerance, {"factor": -1.0}, "factor"),
        (StepRelativeTolerance, {"factor": float("nan")}, "factor"),
    ],
)
def test_tolerances_check_their_arguments(kind: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        kind(**options)


@pytest.mark.parametrize("value", [None, 3, nn.Linear(2, 2), torch.optim.Adam])
def test_the_base_must_be_an_optimizer(value: Any) -> None:
    with pytest.raises(TypeError, match="base"):
        ParallelPicardOptimizer(value)


class SAM(torch.optim.SGD):
    """Sharpness-aware: steps twice and needs the closure in between."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("SAM needs a closure")
        closure()
        return super().step()


class NeedsClosure(torch.optim.SGD):
    """Not known by name: its signature says that the closure is required."""

    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        closure()
        return super().step()


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.LBFGS,
        torch.optim.SparseAdam,
        lambda params: SAM(params, lr=0.1),
        lambda params: NeedsClosure(params, lr=0.1),
    ],
    ids=["LBFGS", "SparseAdam", "SAM", "NeedsClosure"],
)
def test_optimizers_that_cannot_be_wrapped(make: Any) -> None:
    unsupported = make([nn.Parameter(torch.ones(3))])
    with pytest.raises(UnsupportedOptimizerError, match=type(unsupported).__name__) as caught:
        ParallelPicardOptimizer(unsupported)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, PicardError)
    assert "use" in str(caught.value)


@pytest.mark.parametrize("value", [3, "closure", torch.zeros(())])
def test_the_closure_must_be_callable(value: Any) -> None:
    optimizer = ParallelPicardOptimizer(base())
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(value)
    assert optimizer.step_index == 0


@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_without_gradients(window: int) -> None:
    """No backward: told, with the remedy; a healthy closure then finishes bitwise."""
    problem, optimizer, _ = wrap(CASE, window=window)
    healthy = make_closure(problem, optimizer.zero_grad)
    trace = Trace()
    finish(problem, optimizer, healthy, trace, 5)

    def forgot(step: int) -> Tensor:
        optimizer.zero_grad()
        return problem.loss(step)

    optimizer.step_index = 5  # drops the queue: the forgetful closure is the present one
    with pytest.raises(PicardError, match="backward"):
        optimizer.step(forgot)
    assert optimizer.step_index == 5
    finish(problem, optimizer, healthy, trace, CASE.steps - 5)
    assert_same_trace(trace, run_sequential(CASE))


def test_sparse_gradients_are_named() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ParallelPicardOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), window=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="sparse"):
        optimizer.step(closure)


def _replaced(problem: Any, optimizer: Any) -> None:
    """What a densification does: another tensor object in the group, the state re-keyed."""
    old = optimizer.param_groups[0]["params"][0]
    new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)
    problem.groups[0] = new


@pytest.mark.parametrize("audit", ["auto", "never"])
def test_a_closure_that_changes_the_parameter_list(audit: Any) -> None:
    """Refused, by name, before anything is committed."""
    problem, optimizer, _ = wrap(CASE, window=3, audit=audit)
    healthy = make_closure(problem, optimizer.zero_grad)
    finish(problem, optimizer, healthy, Trace(), 4)
    before = [p.detach().clone() for p in problem.parameters]
    optimizer.step_index = 4

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        return loss

    with pytest.raises(RuntimeError, match="parameter list"):
        optimizer.step(closure)
    assert optimizer.step_index == 4
    assert_same_bits([p.detach() for p in problem.parameters], before)


def test_parameters_replaced_between_steps() -> None:
    """Identity changes flush the window; the run goes on with the new tensors."""
    weights = [nn.Parameter(torch.arange(4.0))]
    optimizer = ParallelPicardOptimizer(
        torch.optim.Adam(weights, lr=0.1), window=3, tolerance=float("inf")
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = (weights[0] * torch.randn(weights[0].shape)).sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    old = weights[0]
    grown = nn.Parameter(torch.cat([old.detach(), old.detach()[:2]]))  # densify: 4 -> 6
    weights[0] = optimizer.param_groups[0]["params"][0] = grown
    state = optimizer.state.pop(old)
    optimizer.state[grown] = {
        key: torch.cat([value, value[:2]]) if value.ndim else value for key, value in state.items()
    }
    before = old.detach().clone()
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.step_index == 8
    assert torch.equal(old, before)
    assert not torch.equal(grown[:4], old)
    assert grown.shape == (6,)


def test_a_state_that_does_not_fit_is_refused_before_it_is_loaded() -> None:
    problem, optimizer, _ = wrap(CASE, window=3)
    finish(problem, optimizer, make_closure(problem, optimizer.zero_grad), Trace(), 3)
    kept = [p.detach().clone() for p in problem.parameters]
    other = ParallelPicardOptimizer(base())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.step_index == 3
    trace = Trace()
    finish(problem, optimizer, make_closure(problem, optimizer.zero_grad), trace, 9)
    assert_same_bits(trace.parameters[-1], run_sequential(CASE).parameters[-1])
    assert len(kept) == 4


@pytest.mark.parametrize("value", [-1, 1.0, True, None])
def test_step_index_is_checked(value: Any) -> None:
    optimizer = ParallelPicardOptimizer(base())
    with pytest.raises((TypeError, ValueError), match="step_index"):
        optimizer.step_index = value
    assert optimizer.step_index == 0


def test_many_processes_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun without init_process_group: not eight independent runs."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RuntimeError, match="init_process_group"):
        ParallelPicardOptimizer(base())


def test_everything_public_is_there() -> None:
    names = (
        "ParallelPicardOptimizer AdaptiveTolerance StepRelativeTolerance step_rng launch "
        "PicardError ImpureClosureError NonFiniteGradientError RankMismatchError RankLostError "
        "DesynchronizedError RemoteClosureError UnsupportedOptimizerError PicardWarning"
    )
    for name in names.split():
        assert hasattr(picardopt, name)


def test_only_empty_parameters_are_refused() -> None:
    """Else residuals are 0 / 0, and the user is told of NaN that is in no parameter."""
    base = torch.optim.SGD([torch.nn.Parameter(torch.empty(0, 3))], lr=0.1)
    with pytest.raises(ValueError, match="all of its parameters are empty"):
        ParallelPicardOptimizer(base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_parameters_are_refused_at_construction(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3).to(dtype))
    with pytest.raises(UnsupportedOptimizerError, match=r"float8.*bfloat16"):
        ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1))


def test_meta_parameters_are_refused_at_construction() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedOptimizerError, match=r"meta device.*to_empty"):
        ParallelPicardOptimizer(torch.optim.SGD(module.parameters(), lr=0.1))


def test_lazy_parameters_are_refused_at_construction() -> None:
    module = torch.nn.LazyLinear(2)
    with pytest.raises(UnsupportedOptimizerError, match=r"uninitialized.*run the model once"):
        ParallelPicardOptimizer(torch.optim.SGD(module.parameters(), lr=0.1))


@pytest.mark.parametrize("tolerance", [0, None])
def test_frozen_parameters_of_integers_and_flags_stay_as_they_are(tolerance: Any) -> None:
    """Packed weights, as `model.parameters()` gives them along with what is trained."""
    trained = nn.Parameter(torch.ones(3))
    frozen = [
        nn.Parameter(torch.tensor(values).to(dtype), requires_grad=False)
        for values, dtype in [([1, 0], torch.bool), ([3, 200], torch.uint8), ([-5], torch.int64)]
    ]
    before = [p.clone() for p in frozen]
    base = torch.optim.Adam([frozen[0], trained, *frozen[1:]], lr=0.1)
    optimizer = ParallelPicardOptimizer(base, window=3, tolerance=tolerance)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = (trained * torch.rand(3)).sum()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert optimizer.stats.sweeps < 8
    assert all(map(torch.equal, frozen, before))


def test_a_default_device_concerns_the_users_own_tensors_only() -> None:
    trained = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([trained], lr=0.1), window=3)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = trained.square().sum()
        loss.backward()
        return loss

    with torch.device("meta"):
        for _ in range(6):
            optimizer.step(closure)
    assert trained.max() < 1
