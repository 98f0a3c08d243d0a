"""Optimizers that only read gradients read drifts where they lie; generators are kept where a step may draw."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picardopt import Carry, ParallelPicardOptimizer, Restructure, step_rng
from picardopt.bases import JoinedOptimizer
from picardopt.drift import Drift
from picardopt.layout import ParameterLayout
from picardopt.lending import READERS, Lending
from tests.helpers.problems import Problem
from tests.helpers.runs import assert_same_bits, make_closure

SHAPES = ((3, 5), (1,), (17,), (40, 9), ())
Optimizers = type[torch.optim.Optimizer]
VARIED: dict[str, list[Any]] = {
    "weight_decay": [0, 0.1],
    "maximize": [False, True],
    "amsgrad": [False, True],
    "momentum": [0, 0.9],
    "dampening": [0, 0.1],
    "centered": [False, True],
    "lr_decay": [0, 0.1],
}


def parameters_of_shapes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, requires_grad=True) for s in SHAPES]


def choices(kind: Optimizers) -> list[dict[str, Any]]:
    """Every combination of the options that change an optimizer's arithmetic."""
    names = [n for n in VARIED if n in kind(parameters_of_shapes(), lr=1e-2).defaults]  # type: ignore[call-arg]
    values = itertools.product(*(VARIED[name] for name in names))
    return [dict(zip(names, each, strict=True)) for each in values]


def run_alone(kind: Optimizers, options: dict[str, Any]) -> list[Tensor]:
    """Seven steps over random gradients, of which one is 0; that they are left alone is checked."""
    parameters, generator = parameters_of_shapes(), torch.Generator().manual_seed(1)
    optimizer, drawn = kind(parameters, lr=1e-2, **options), torch.get_rng_state()  # type: ignore[call-arg]
    for step in range(7):
        whole = torch.randn(sum(p.numel() for p in parameters), generator=generator) * (step != 4)
        parts = whole.split([p.numel() for p in parameters])
        version, before = whole._version, whole.clone()
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        optimizer.step()
        assert whole._version == version
        assert torch.equal(whole, before)
        kept = [value for state in optimizer.state.values() for value in state.values()]
        address = whole.untyped_storage().data_ptr()
        assert all(
            value.untyped_storage().data_ptr() != address
            for value in kept
            if isinstance(value, Tensor)
        )
    assert torch.equal(drawn, torch.get_rng_state())
    return parameters


@pytest.mark.parametrize("kind", READERS)
def test_readers_only_read_gradients(kind: Optimizers) -> None:
    for options in choices(kind):
        for implementation in ({}, {"foreach": True}, {"fused": True}):
            if "fused" not in implementation or "fused" in kind([torch.ones(1)], lr=1e-2).defaults:  # type: ignore[call-arg]
                run_alone(kind, {**options, **implementation})


def slopes() -> Problem:
    """A constant drift: at tolerance 0 every guess is right to the bit."""
    parameter = torch.nn.Parameter(torch.ones(4))
    return Problem([parameter], lambda step: parameter.sum())


def patched(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    step = base.step
    base.step = lambda: step()  # type: ignore[method-assign,assignment]
    return base


class MyAdam(torch.optim.Adam):
    """Like Adam, for all that is known of it."""


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: MyAdam(ps),
        lambda ps: torch.optim.SGD(ps, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Rprop(ps),
        lambda ps: torch.optim.Adam([*ps, torch.randn(4, 3).T.requires_grad_()]),
        lambda ps: torch.optim.Adam([*ps, torch.randn(3, dtype=torch.cfloat).requires_grad_()]),
        lambda ps: JoinedOptimizer([torch.optim.Adam(ps[:1]), MyAdam(ps[1:])]),
        lambda ps: patched(torch.optim.Adam(ps)),
    ],
)
def test_others_get_copies(make: Callable[[list[Tensor]], Any]) -> None:
    assert not lends(make(parameters_of_shapes()))


def lends(base: Any) -> bool:
    parameters = [p for group in base.param_groups for p in group["params"]]
    layout = ParameterLayout(parameters)
    row = layout.row()
    Lending(base, layout).set_gradients(Drift(0, row, (True,) * len(parameters)))
    lent = {p.grad is gradient for p, gradient in zip(parameters, row.tensors, strict=True)}
    assert len(lent) == 1
    return lent.pop()


@pytest.mark.parametrize("kind", READERS)
def test_readers_get_the_drift_itself(kind: Optimizers) -> None:
    parameters = parameters_of_shapes()
    assert lends(kind(parameters, lr=1e-2))  # type: ignore[call-arg]
    assert lends(JoinedOptimizer([kind(parameters[:1], lr=1e-2), torch.optim.Adam(parameters[1:])]))  # type: ignore[call-arg]


@pytest.mark.parametrize("older", [False, True])
def test_a_schedulers_count_of_steps_is_no_step_of_its_own(older: bool) -> None:
    """The wrapper of torch 2.4 and older does not say what it wraps."""
    base = torch.optim.Adam(parameters_of_shapes())
    lending = Lending(base, ParameterLayout(base.param_groups[0]["params"]))
    torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    counting = vars(base)["step"]
    if older:
        vars(counting).pop("__wrapped__", None)
    assert lending.only_reads
    # The same around a step of somebody's own.
    counting = count_calls(lambda *_: None)
    base.step = counting  # type: ignore[method-assign]
    assert hasattr(counting, "_wrapped_by_lr_sched")
    assert not lending.only_reads


def count_calls(func: Callable[..., Any]) -> Any:
    """As torch 2.4's schedulers do."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


def random_hooks(base: torch.optim.Optimizer) -> None:
    def hook(*_: Any) -> None:
        for group in base.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3 * torch.randn(parameter.shape))

    base.register_step_post_hook(hook)


@pytest.mark.parametrize("added", [0, 3])
def test_a_hook_draws_from_the_steps_own_stream(added: int) -> None:
    """Also one that is added while drifts wait that were evaluated without it: generators were not kept for them."""
    got, expected = slopes(), slopes()
    base, alone = (torch.optim.Adam(p.parameters, lr=1e-2) for p in (got, expected))
    optimizer = ParallelPicardOptimizer(base, window=4, tolerance=0)
    closure, closure_alone = (
        make_closure(got, base.zero_grad),
        make_closure(expected, alone.zero_grad),
    )
    for step in range(8):
        if step == added:
            random_hooks(base)
            random_hooks(alone)
        optimizer.step(closure)
        with step_rng(0, step):
            closure_alone(step)
            alone.step()
        assert_same_bits(
            [p.detach() for p in got.parameters], [p.detach() for p in expected.parameters]
        )


def test_generators_are_kept_only_for_steps_that_may_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(base: Any, **options: Any) -> bool:
        optimizer = ParallelPicardOptimizer(base, window=4, **options)
        optimizer.step(lambda: base.param_groups[0]["params"][0].sum().backward())
        assert optimizer._speculator is not None
        return optimizer._speculator.queue[0].drift.rng is not None

    def adam(kind: Any = torch.optim.Adam) -> Any:
        return kind([torch.nn.Parameter(torch.ones(3))], lr=1e-2)

    assert not kept(adam(), tolerance=1.0)
    assert kept(adam(MyAdam), tolerance=1.0)
    hooked = adam()
    random_hooks(hooked)
    assert kept(hooked, tolerance=1.0)
    scheduled = adam()
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: torch.rand(()).item())
    assert kept(scheduled, tolerance=1.0, lr_scheduler=scheduler)
    assert kept(adam(), tolerance=1.0, carry=Carry([torch.zeros(2)], lambda _: None))
    assert kept(
        adam(), tolerance=1.0, restructure=Restructure(lambda step: None, lambda step: False)
    )
