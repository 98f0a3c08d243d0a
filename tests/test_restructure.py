"""Steps that change the number of parameters: bitwise at tolerance 0, and the paper's window across them."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picardopt import Carry, DriftTolerance, ParallelPicardOptimizer, Restructure
from picardopt.layout import ParameterLayout
from picardopt.restructure import Remap
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits, quiet
from tests.helpers.splats import EVERY, Densify, build, due, sequential, tensors_of

STEPS = 23


def wrap(across: bool = False, coarse: bool = False, **options: Any) -> tuple[Any, ...]:
    splats, optimizers, restructure = build(coarse, across)
    options = {"tolerance": 0, "seed": 3, "restructure": restructure, "carry": splats, **options}
    return splats, optimizers, ParallelPicardOptimizer(list(optimizers.values()), **options)


def run(steps: int = STEPS, **options: Any) -> tuple[list[Any], list[Any], Any]:
    splats, optimizers, optimizer = wrap(**options)
    losses, states = [], []
    for _ in range(steps):
        losses.append(optimizer.step(splats.closure))
        states.append(tensors_of(splats, optimizers))
    return losses, states, optimizer.stats


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_bitwise_after_every_step(window: int, across: bool) -> None:
    expected_losses, expected = sequential(STEPS)
    losses, states, stats = run(window=window, across=across)
    assert_same_bits(losses, expected_losses)
    assert_same_bits(states, expected)
    assert len(states[-1][0]["means"]) > 6
    assert stats.sweeps <= stats.steps == STEPS


@given(
    st.integers(1, 9),
    st.sampled_from(["hold", "coast"]),
    st.booleans(),
    st.integers(1, 14),
    st.booleans(),
)
@settings(max_examples=25)
def test_k_sweeps_make_k_steps_exact(
    window: int, predictor: str, across: bool, steps: int, known: bool
) -> None:
    """The theorem where iterates have changing dimensions."""
    _, expected = sequential(steps)
    splats, optimizers, optimizer = wrap(
        window=window, predictor=predictor, across=across, total_steps=steps if known else None
    )
    for t in range(steps):
        optimizer.step(splats.closure)
        assert_same_bits(tensors_of(splats, optimizers), expected[t])
        assert optimizer.stats.sweeps <= t + 1
    ends = [0, *accumulate(optimizer.stats.strides)]
    assert all(not any(map(due, range(a, b - 1))) for a, b in pairwise(ends))


def _traced(options: dict[str, Any]) -> tuple[list[Any], list[Any], list[int]]:
    losses, states, stats = run(**options)
    return losses, states, stats.strides


def test_guesses_are_taken_across_with_their_parents() -> None:
    """Points move little here: nothing evaluated before the restructuring step is lost behind it."""
    _, _, stats = run(window=7, across=True, tolerance=1e-2, total_steps=STEPS)
    assert stats.wasted_evaluations == 0
    assert stats.strides == [7, 7, 7, 2]


@pytest.mark.parametrize("world_size", [2, 3])
def test_bitwise_on_processes(pools: Pools, world_size: int) -> None:
    expected_losses, expected = sequential(STEPS)
    for losses, states, _ in pools(world_size).run(_traced, {"window": 4}):
        assert_same_bits(losses, expected_losses)
        assert_same_bits(states, expected)


def test_ranks_go_across_together(pools: Pools) -> None:
    options = {"window": 6, "across": True, "tolerance": 1e-2}
    one = _traced(options)
    assert max(one[2]) > EVERY
    for other in pools(2).run(_traced, options):
        assert_same_bits(other, one)


def test_the_exact_window_ends_there_and_wastes_nothing() -> None:
    options = {"window": 8, "tolerance": float("inf"), "total_steps": STEPS}
    _, _, stats = run(**options)
    assert stats.strides == [EVERY] * 4 + [3]
    assert stats.wasted_evaluations == 0


def test_the_papers_window_runs_across() -> None:
    """Nothing is refused at an infinite tolerance: strides are whole windows, and the run stays near."""
    _, states, stats = run(window=8, across=True, tolerance=float("inf"), total_steps=STEPS)
    assert stats.strides == [8, 8, 7]
    assert stats.wasted_evaluations == 0
    _, expected = sequential(STEPS)
    assert states[-1][0]["means"].shape == expected[-1][0]["means"].shape


def test_a_guess_too_far_from_its_unprojection_is_dropped() -> None:
    """The points born at a split have moved by a draw: more than this tolerance allows."""
    _, _, stats = run(window=8, across=True, tolerance=1e-5, total_steps=STEPS)
    ends = [0, *accumulate(stats.strides)]
    crossed = sum(any(map(due, range(a, b - 1))) for a, b in pairwise(ends))
    assert crossed
    assert stats.wasted_evaluations >= crossed


def test_unprojection_follows_the_parents() -> None:
    def layout(rows: int, shared: torch.Tensor) -> ParameterLayout:
        points = torch.zeros(rows, 2, requires_grad=True)
        return ParameterLayout([points, shared], [torch.zeros(rows, dtype=torch.int64)])

    shared = torch.zeros(3, requires_grad=True)
    old, new = layout(3, shared), layout(4, shared)
    row = old.row()
    values = torch.arange(6.0).view(3, 2)
    row.store([values, torch.tensor([7.0, 8.0, 9.0]), torch.tensor([10, 20, 30])])
    moved = Remap(old, new, torch.tensor([2, 0, 0, 1]))(row)
    assert torch.equal(moved.tensors[0], values[[2, 0, 0, 1]])
    assert torch.equal(moved.tensors[1], torch.tensor([7.0, 8.0, 9.0]))
    assert torch.equal(moved.carry[0], torch.tensor([30, 10, 10, 20]))


@pytest.mark.parametrize(
    ("parents", "match"),
    [
        (torch.tensor([0, 1, 2]), "do not lead from shape"),
        (torch.tensor([0, 1, 2, 3]), "do not lead from shape"),
        (torch.tensor([0, 1, 2, -1]), "negative"),
        (torch.tensor([0.0, 1.0, 2.0, 2.0]), "int64"),
        ([0, 1, 2, 2], "int64"),
    ],
)
def test_parents_that_do_not_fit_are_refused(parents: Any, match: str) -> None:
    old = ParameterLayout([torch.zeros(3, 2, requires_grad=True)])
    new = ParameterLayout([torch.zeros(4, 2, requires_grad=True)])
    with pytest.raises(ValueError, match=match):
        Remap(old, new, parents)


def test_wrong_parents_raise_after_the_step_and_the_run_goes_on() -> None:
    splats, optimizers, restructure = build(across=True)

    def wrong(step: int) -> torch.Tensor:
        parents = restructure.function(step)
        return parents[:-1] if step == EVERY - 1 else parents

    optimizer = ParallelPicardOptimizer(
        list(optimizers.values()),
        window=4,
        tolerance=1.0,
        seed=3,
        carry=splats,
        restructure=replace(restructure, function=wrong),
    )
    for _ in range(EVERY - 1):
        optimizer.step(splats.closure)
    with pytest.raises(ValueError, match="do not lead"):
        optimizer.step(splats.closure)
    assert optimizer.step_index == EVERY
    for _ in range(EVERY):
        optimizer.step(splats.closure)


def test_resumes_bitwise_across_a_restructuring_step() -> None:
    """The parameters' number is the user's to restore; the rest is the state dict's."""
    _, expected = sequential(STEPS)
    splats, _, optimizer = wrap(window=4)
    for _ in range(EVERY + 2):
        optimizer.step(splats.closure)
    saved = copy.deepcopy((splats.state_dict(), optimizer.state_dict()))
    again, _, _ = build()
    for name in ("means", "heights"):
        setattr(again, name, torch.nn.Parameter(saved[0][name].clone()))
    for name in ("slopes", "seen"):
        setattr(again, name, saved[0][name].clone())
    again.load_state_dict(saved[0])
    bases = again.optimizers()
    resumed = ParallelPicardOptimizer(
        list(bases.values()),
        window=7,
        tolerance=0,
        carry=again,
        restructure=Restructure(Densify(again, bases), due),
    )
    resumed.load_state_dict(saved[1])
    for t in range(EVERY + 2, STEPS):
        resumed.step(again.closure)
        assert_same_bits(tensors_of(again, bases), expected[t])


def test_what_is_no_restructure_is_refused() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    base = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(TypeError, match="restructure="):
        ParallelPicardOptimizer(base, restructure=due)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="function="):
        Restructure(None, due)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 4])
def test_a_skipped_step_restructures_from_its_own_stream(window: int) -> None:
    """The ambient generator, different on each rank, must not decide how points split."""
    states = []
    for ambient in (1, 2):
        splats, optimizers, optimizer = wrap(window=window, nonfinite="skip")

        def closure(step: int, splats: Any = splats) -> torch.Tensor:
            loss = splats.closure(step)
            if step == EVERY - 1:
                splats.background.grad.fill_(float("inf"))
            return loss

        torch.manual_seed(ambient)
        with quiet():
            for _ in range(EVERY + 2):
                optimizer.step(closure)
        states.append(tensors_of(splats, optimizers))
    assert_same_bits(states[0], states[1])


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


@pytest.mark.parametrize("across", [False, True])
def test_always_audited(across: bool) -> None:
    """The audit meets every kind of drift that can be evaluated again, on either side of a split."""
    *_, stats = run(window=7, across=across, tolerance=1e-2, audit="always")
    assert stats.audits >= STEPS // 7


def test_a_scheduler_goes_on_across() -> None:
    rates = []
    for across in (False, True):
        splats, optimizers, restructure = build(across=across)
        bases = list(optimizers.values())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(bases[0], 0.9)
        optimizer = ParallelPicardOptimizer(
            bases,
            window=6,
            tolerance=1e-2,
            lr_scheduler=scheduler,
            carry=splats,
            restructure=restructure,
        )
        for _ in range(STEPS):
            optimizer.step(splats.closure)
            scheduler.step()
        rates.append(bases[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] == pytest.approx(1e-2 * 0.9**STEPS)


def test_what_steps_returned_for_the_update_goes_across_with_its_rows() -> None:
    """Steps 5 and 6 were evaluated before the points split: their statistics are the parents'."""
    splats, optimizers, restructure = build(across=True)
    evaluated: dict[int, dict[str, torch.Tensor]] = {}
    parents: list[torch.Tensor] = []

    def closure(step: int) -> dict[str, torch.Tensor]:
        splats.zero_grad()
        loss = (splats(2 * torch.rand(16) - 1) - 1).square().mean()
        loss.backward()
        assert splats.means.grad is not None
        slopes = splats.means.grad.abs().float()
        returned = {"loss": loss, "slopes": slopes, "other": torch.arange(3)}
        evaluated.setdefault(step, returned)
        return returned

    def update(returned: dict[str, torch.Tensor]) -> None:
        splats.slopes += returned["slopes"]
        splats.seen += 1

    def function(step: int) -> torch.Tensor:
        parents.append(restructure.function(step))
        return parents[-1]

    optimizer = ParallelPicardOptimizer(
        list(optimizers.values()),
        window=7,
        tolerance=float("inf"),
        seed=3,
        carry=Carry(splats, update),
        restructure=replace(restructure, function=function),
    )
    returned = [optimizer.step(closure) for _ in range(7)]
    assert optimizer.stats.strides == [7]
    for step in (EVERY, EVERY + 1):
        assert_same_bits(returned[step]["slopes"], evaluated[step]["slopes"][parents[0]])
        assert_same_bits(returned[step]["loss"], evaluated[step]["loss"].detach())
        assert_same_bits(returned[step]["other"], torch.arange(3))
    assert_same_bits(splats.slopes, returned[EVERY]["slopes"] + returned[EVERY + 1]["slopes"])
    assert torch.equal(splats.seen, torch.full_like(splats.seen, 2))


@pytest.mark.parametrize("held", ["captured", "an attribute", "of a dataclass"])
def test_a_failed_step_puts_back_the_parameters_that_a_dict_or_a_list_holds(held: str) -> None:
    """As gsplat keeps them: parameters in a dict, statistics in another, here with a list of them too."""
    parameters = {"points": torch.nn.Parameter(torch.zeros(4))}
    statistics = {"seen": torch.zeros(4)}
    history, calls = [parameters["points"]], Counter({"never": 0})
    base = torch.optim.Adam([parameters["points"]], lr=0.1)

    class Held:
        def __init__(self) -> None:
            self.parameters, self.statistics, self.history = parameters, statistics, history
            self.calls = calls

        def __call__(self, step: int) -> torch.Tensor:
            return split(self.parameters, self.statistics, self.history, self.calls)

    @dataclass
    class Lists:
        parameters: dict[str, torch.nn.Parameter]
        statistics: dict[str, torch.Tensor]
        history: list[torch.nn.Parameter]

    def split(parameters: Any, statistics: Any, history: Any, calls: Any) -> torch.Tensor:
        parents = torch.arange(4).repeat(2)
        old = parameters["points"]
        new = parameters["points"] = torch.nn.Parameter(old.detach()[parents])
        statistics["seen"], statistics["new"] = torch.zeros(8), torch.zeros(8)
        calls["split"] += 1
        base.state[new] = {
            k: v[parents] if v.shape == old.shape else v for k, v in base.state.pop(old).items()
        }
        base.param_groups[0]["params"] = [new]
        history.append(new)
        if failing:
            raise KeyboardInterrupt
        return parents

    lists = Lists(parameters, statistics, history)
    function = {
        "captured": lambda step: split(parameters, statistics, history, calls),
        "an attribute": Held(),
        "of a dataclass": lambda step: split(
            lists.parameters, lists.statistics, lists.history, calls
        ),
    }[held]
    optimizer = ParallelPicardOptimizer(
        [base], window=4, tolerance=0, restructure=Restructure(function, lambda step: step == 2)
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameters["points"] - torch.rand(())).square().mean()
        loss.backward()
        return loss

    failing = [True]
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
    """Doubles the points, in a module or a dict, and in their optimizer; or fails when that is done."""
    parents = torch.arange(4).repeat(2)
    for base in bases:
        old = splats["points"]
        new = splats["points"] = torch.nn.Parameter(old.detach()[parents])
        base.state[new] = {
            k: v[parents] if v.shape == old.shape else v for k, v in base.state.pop(old).items()
        }
        base.param_groups[0]["params"] = [new]
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


@pytest.mark.parametrize("across", [False, True])
def test_drift_errors_are_measured_anew_after_a_change_of_structure(across: bool) -> None:
    """Groups, secants and kept drifts belong to one structure; the run goes on, and near the sequential one."""
    _, states, stats = run(window=8, across=across, tolerance=DriftTolerance(), audit="always")
    _, expected = sequential(STEPS)
    assert len(states[-1][0]["means"]) == len(expected[-1][0]["means"])
    assert stats.mean_stride > 1.2
    assert all(0 <= error < 1 for error in stats.drift_error)
    assert stats.audits > 0
