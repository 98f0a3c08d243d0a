"""Steps ahead may be made by torch's faster implementations; what commits is the base's own step, bit for bit."""

import importlib
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
from picardopt.shortcuts import FUSED, READERS, Shortcuts
from tests.helpers.problems import Problem
from tests.helpers.runs import assert_same_bits, make_closure

Seen = list[tuple[str, str | None]]
Watch = Callable[[torch.optim.Optimizer], Seen]
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
def test_readers_only_read_gradients_and_foreach_gives_the_same_bits(kind: Optimizers) -> None:
    for options in choices(kind):
        alone = run_alone(kind, options)
        assert_same_bits(run_alone(kind, {**options, "foreach": True}), alone)
        if kind in FUSED:
            for got, expected in zip(
                run_alone(kind, {**options, "fused": True}), alone, strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def bowl(size: int = 6) -> Problem:
    """Smooth and noisy: guesses at a tolerance are accepted."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for _ in range(3)]

    def loss(step: int) -> Tensor:
        noise = 0.01 * torch.randn(size)
        terms = [((i + 1) * p.square() + noise * p).sum() for i, p in enumerate(parameters)]
        return torch.stack(terms).sum()

    return Problem(list(parameters), loss)


def slopes() -> Problem:
    """A constant drift: at tolerance 0 every guess is right to the bit."""
    parameter = torch.nn.Parameter(torch.ones(4))
    return Problem([parameter], lambda step: parameter.sum())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.optim.Optimizer], Seen]:
    """Notes for each step of a base whether it commits or runs ahead, and which option is set."""

    def watching(base: torch.optim.Optimizer) -> Seen:
        seen, kind = Seen(), type(base)
        step = kind.step
        base.register_step_post_hook(lambda *_: None)  # disabled in steps ahead

        def noting(self: torch.optim.Optimizer) -> None:
            if self is base:
                group, hooks = base.param_groups[0], base._optimizer_step_post_hooks
                option = next((name for name in ("fused", "foreach") if group[name]), None)
                seen.append(("commit" if hooks else "ahead", option))
            step(self)

        monkeypatch.setattr(kind, "step", noting)
        return seen

    return watching


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_commits_are_the_bases_own_steps_at_a_tolerance_too(kind: Optimizers, watch: Watch) -> None:
    problem = bowl()
    base = kind(problem.parameters, lr=1e-2)  # type: ignore[call-arg]
    seen, closure = watch(base), make_closure(problem, base.zero_grad)
    optimizer = ParallelPicardOptimizer(base, window=4)
    twins = [p.detach().clone().requires_grad_() for p in problem.parameters]
    alone = kind(twins, lr=1e-2)  # type: ignore[call-arg]
    for _ in range(24):
        optimizer.step(closure)
        for twin, parameter in zip(twins, problem.parameters, strict=True):
            assert parameter.grad is not None
            twin.grad = parameter.grad.clone()
        alone.step()
        assert_same_bits([p.detach() for p in problem.parameters], [t.detach() for t in twins])
        assert base.param_groups[0]["fused"] is base.param_groups[0]["foreach"] is None
    assert optimizer.stats.mean_stride > 2
    assert set(seen) == {("commit", None), ("ahead", "fused")}


def test_at_tolerance_0_small_tensors_are_stepped_together(watch: Watch) -> None:
    problem = bowl()
    base = torch.optim.Adam(problem.parameters, lr=1e-2)
    seen, closure = watch(base), make_closure(problem, base.zero_grad)
    optimizer = ParallelPicardOptimizer(base, window=4, tolerance=0)
    for _ in range(8):
        optimizer.step(closure)
    assert set(seen) == {("commit", None), ("ahead", "foreach")}


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"fused": False}, {"foreach": True}, {"fused": True}]
)
def test_options_chosen_by_hand_stay(options: dict[str, Any], watch: Watch) -> None:
    problem = bowl()
    base = torch.optim.Adam(problem.parameters, lr=1e-2, **options)
    seen, closure = watch(base), make_closure(problem, base.zero_grad)
    optimizer = ParallelPicardOptimizer(base, window=4)
    for _ in range(8):
        optimizer.step(closure)
    expected = next((name for name, value in options.items() if value), None)
    assert {option for _, option in seen} == {expected}


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
        lambda ps: torch.optim.Adam(ps, betas=(torch.tensor(0.9), torch.tensor(0.9))),
        lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-3)),
        lambda ps: torch.optim.Adam([*ps, torch.randn(4, 3).T.requires_grad_()]),
        lambda ps: torch.optim.Adam([*ps, torch.randn(3, dtype=torch.cfloat).requires_grad_()]),
        lambda ps: JoinedOptimizer([torch.optim.Adam(ps[:1]), MyAdam(ps[1:])]),
        lambda ps: patched(torch.optim.Adam(ps)),
    ],
)
def test_others_are_stepped_as_they_are(make: Callable[[list[Tensor]], Any]) -> None:
    base = make(parameters_of_shapes())
    parameters = [p for group in base.param_groups for p in group["params"]]
    before = [dict(group) for group in base.param_groups]
    layout = ParameterLayout(parameters)
    shortcuts = Shortcuts(base, layout, exact=False)
    shortcuts.begin()
    shortcuts.set_options()
    assert [dict(group) for group in base.param_groups] == before
    row = layout.row()
    shortcuts.set_gradients(Drift(0, row, (True,) * len(parameters)))
    lent = [p.grad is gradient for p, gradient in zip(parameters, row.tensors, strict=True)]
    assert any(lent) is shortcuts.only_reads


@pytest.mark.parametrize("tolerance", [0, 1e-12])
def test_guesses_that_do_not_come_true_are_made_by_the_bases_own_step(
    tolerance: float, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a version of torch rounds differently: no result is wrong, and some sweeps later all is as before."""
    name = "_multi_tensor_adam" if tolerance == 0 else "_fused_adam"
    module = importlib.import_module("torch.optim.adam")
    right = getattr(module, name)

    def wrong(params: list[Tensor], *args: Any, **options: Any) -> None:
        right(params, *args, **options)
        torch._foreach_add_(params, 1e-3)

    problem = slopes()
    (parameter,) = problem.parameters
    base = torch.optim.Adam([parameter], lr=1e-2)
    seen, closure = watch(base), make_closure(problem, base.zero_grad)
    optimizer = ParallelPicardOptimizer(base, window=4, tolerance=tolerance)
    monkeypatch.setattr(module, name, wrong)
    for _ in range(40):
        optimizer.step(closure)
    twin = torch.ones(4, requires_grad=True)
    alone = torch.optim.Adam([twin], lr=1e-2)
    for _ in range(40):
        twin.grad = torch.ones(4)
        alone.step()
    assert_same_bits(parameter.detach(), twin.detach())
    assert {option for _, option in seen[-9:]} == {None}
    assert max(optimizer.stats.strides[-3:]) > 1


def test_a_step_ahead_that_fails_is_not_made_so_again(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented here")

    problem = slopes()
    base = torch.optim.Adam(problem.parameters, lr=1e-2)
    seen, closure = watch(base), make_closure(problem, base.zero_grad)
    optimizer = ParallelPicardOptimizer(base, window=4, tolerance=1.0)
    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "_fused_adam", failing)
    for _ in range(5):
        optimizer.step(closure)
    assert optimizer.stats.strides == [4, 4]
    assert seen[0] == ("ahead", "fused")
    assert {option for _, option in seen[1:]} == {None}


def test_a_schedulers_count_of_steps_is_no_step_of_its_own() -> None:
    base = torch.optim.Adam(parameters_of_shapes())
    shortcuts = Shortcuts(base, ParameterLayout(base.param_groups[0]["params"]), exact=False)
    torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    assert "step" in vars(base)
    assert shortcuts.only_reads


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
