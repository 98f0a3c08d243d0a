"""What goes across a change of structure with its rows' parents, and parents that do not fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from picardopt import Carry, ParallelPicardOptimizer
from picardopt.layout import ParameterLayout
from picardopt.restructure import Remap
from tests.helpers.runs import assert_same_bits
from tests.helpers.splats import EVERY, build


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
