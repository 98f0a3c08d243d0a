"""Steps that change the number of parameters: bitwise at tolerance 0, and the paper's window across them."""

import copy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picardopt import DriftTolerance, ParallelPicardOptimizer, Restructure
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


@pytest.mark.parametrize("across", [False, True])
def test_drift_errors_are_measured_anew_after_a_change_of_structure(across: bool) -> None:
    """Groups, secants and kept drifts belong to one structure; the run goes on, and near the sequential one."""
    _, states, stats = run(window=8, across=across, tolerance=DriftTolerance(), audit="always")
    _, expected = sequential(STEPS)
    assert len(states[-1][0]["means"]) == len(expected[-1][0]["means"])
    assert stats.mean_stride > 1.2
    assert all(0 <= error < 1 for error in stats.drift_error)
    assert stats.audits > 0
