"""The adapter for DreamGaussian, with what stands for its interface: every bit of the loop that it changes."""

import re
from typing import Any

import pytest
import torch

from picardopt import step_rng
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.adapters.dreamgaussian import GUI, options, present
from tests.integrations.adapters.folder import ADAPTERS, load

FOLDER = ADAPTERS / "dreamgaussian"
STEPS = 34
EVENTS = 3 + 2
"""Densified after steps 8, 16 and 24, opacities reset after steps 11 and 22."""


def adapter() -> Any:
    return load("picard_loop", FOLDER / "picard_loop.py")


def sequential() -> tuple[list[torch.Tensor], dict[str, Any]]:
    gui, losses = GUI(adapter(), options()), []
    gui.prepare_train(wrapped=False)
    for step in range(STEPS):
        with step_rng(0, step):
            losses.append(gui.own_train_step())
    return losses, present(gui)


def changed(**picard: Any) -> tuple[list[torch.Tensor], dict[str, Any], Any]:
    gui = GUI(adapter(), options(picard=picard))
    gui.prepare_train(wrapped=True)
    losses = [gui.train_step() for _ in range(STEPS)]
    # The scheduler has set the rate of the step that comes next.
    gui.renderer.gaussians.update_learning_rate(STEPS)
    return losses, present(gui), gui.optimizer.stats


def changed_on_a_rank() -> Any:
    losses, result, stats = changed(tolerance=0)
    return losses, result, stats.strides


@pytest.mark.parametrize("window", [1, 4, 8])
def test_at_tolerance_0_every_bit_is_that_of_the_loop_as_it_is(window: int) -> None:
    expected_losses, expected = sequential()
    losses, result, stats = changed(window=window, tolerance=0)
    assert_same_bits(losses, expected_losses)
    assert_same_bits(result, expected)
    assert stats.steps == STEPS
    assert len(result["parameters"][0]) > 6
    if window > 1:
        assert max(stats.strides) > 2
        assert stats.sweeps < STEPS


def test_two_processes_share_the_window(pools: Pools) -> None:
    expected_losses, expected = sequential()
    for losses, result, strides in pools(2).run(changed_on_a_rank):
        assert_same_bits(losses, expected_losses)
        assert_same_bits(result, expected)
        assert max(strides) == 2


def test_the_window_ends_where_gaussians_change() -> None:
    _, _, stats = changed(window=8, tolerance=float("inf"))
    ends = {record.step + record.slots for record in stats.records}
    assert {8, 11, 16, 22, 24} <= ends
    # Of 34 steps in windows of 8, six windows are shorter than they could be.
    assert stats.sweeps < STEPS / 3


def test_what_the_loop_counts_drops_nothing() -> None:
    _, _, stats = changed(window=8, tolerance=0)
    assert stats.outer_changes == 0


def test_an_error_while_gaussians_change_undoes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gui = GUI(adapter(), options(picard={"window": 4, "tolerance": 0}))
    gui.prepare_train(wrapped=True)
    for _ in range(7):
        gui.train_step()
    before = present(gui)

    def fail(*arguments: Any) -> None:
        original(*arguments)
        raise RuntimeError("no memory")

    original = gui.renderer.gaussians.densify_and_prune
    with monkeypatch.context() as patched:
        patched.setattr(gui.renderer.gaussians, "densify_and_prune", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            gui.train_step()
    gui.step -= 1
    after = present(gui)
    assert_same_bits(after, before)
    for _ in range(STEPS - 7):
        gui.train_step()
    assert_same_bits(present(gui)["parameters"], sequential()[1]["parameters"])


def test_the_diff_calls_what_there_is() -> None:
    diff = (FOLDER / "dreamgaussian.diff").read_text()
    called = set(re.findall(r"^\+.*picard_loop\.(\w+)", diff, flags=re.MULTILINE))
    assert called == {"start", "rank", "wrap", "step"}
    assert all(callable(getattr(adapter(), name)) for name in called)
    defined = set(re.findall(r"^\+    def (\w+)\(", diff, flags=re.MULTILINE))
    assert defined == {"loss", "record", "densify", "train_step"}
    assert all(callable(getattr(GUI, name)) for name in defined)
