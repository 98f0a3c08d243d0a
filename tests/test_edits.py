"""Law 4: what the user moves between two steps counts; the queue of that moment does not."""

from typing import Any

import pytest
import torch

from picardopt import step_rng
from tests.helpers.problems import Problem
from tests.helpers.runs import Case, Trace, assert_same_trace, make_closure, wrap

CASE = Case("network", "Adam", steps=16)


def _edit_parameters(problem: Problem, optimizer: Any) -> None:
    with torch.no_grad():
        problem.parameters[0].mul_(0.5)


def _edit_one_bit(problem: Problem, optimizer: Any) -> None:
    with torch.no_grad():
        first = problem.parameters[0].view(-1)
        first[:1] = torch.nextafter(first[:1], first[:1] + 1)


def _edit_rate(problem: Problem, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 3


def _edit_state(problem: Problem, optimizer: Any) -> None:
    optimizer.state[problem.parameters[0]]["exp_avg"].zero_()


def _edit_requires_grad(problem: Problem, optimizer: Any) -> None:
    """Gradual unfreezing: the drifts in the queue have a gradient too many, or one too few."""
    problem.parameters[2].requires_grad_(not problem.parameters[2].requires_grad)


def _edit_data(problem: Problem, optimizer: Any) -> None:
    problem.parameters[2].data = problem.parameters[2].data * 2


EDITS = [_edit_parameters, _edit_one_bit, _edit_rate, _edit_state, _edit_requires_grad, _edit_data]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("moments", [{6}, {7}, {3, 8, 9}])
def test_edits_between_steps_stay_exact(edit: Any, moments: set[int]) -> None:
    """The queue is dropped where the parameters are no longer those of its drifts."""
    problem, base = CASE.build()
    closure, expected = make_closure(problem, base.zero_grad), Trace()
    for t in range(CASE.steps):
        if t in moments:
            edit(problem, base)
        with step_rng(0, t):
            loss = closure(t)
            base.step()
        expected.record(loss, problem, base)
    problem, optimizer, _ = wrap(CASE, window=4)
    closure, trace = make_closure(problem, optimizer.zero_grad), Trace()
    for t in range(CASE.steps):
        if t in moments:
            edit(problem, optimizer)
        trace.record(optimizer.step(closure), problem, optimizer)
    assert_same_trace(trace, expected)
    assert max(optimizer.stats.strides) >= 2
    assert optimizer.stats.sweeps < CASE.steps
