"""Law 3: step t's randomness is a function of (seed, t) alone, and is put back afterwards."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from picardopt import ParallelPicardOptimizer, step_rng
from tests.helpers.runs import (
    Case,
    Trace,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    outside_streams,
    sequential,
    wrap,
)

CASE = Case("network", "Adam", steps=16)


def test_the_outer_streams_go_on_untouched() -> None:
    """Law 3: what a closure draws never shows outside, and the outside never shows inside."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    closure, trace = make_closure(problem, optimizer.zero_grad), Trace()
    for t in range(CASE.steps):
        torch.manual_seed(t)
        np.random.seed(t)
        random.seed(t)
        before = outside_streams()
        trace.record(optimizer.step(closure), problem, optimizer)
        assert_same_bits(outside_streams(), before)
    assert_same_trace(trace, expected)


def test_seed_one_is_not_the_shifted_stream_of_seed_zero() -> None:
    def stream(seed: int) -> set[tuple[float, float, float]]:
        drawn = set()
        for t in range(60):
            with step_rng(seed, t):
                drawn.add((float(torch.rand(())), float(np.random.rand()), random.random()))
        return drawn

    zero, one, again = stream(0), stream(1), stream(0)
    assert zero == again
    assert len(zero) == 60
    for index in range(3):
        assert not {draw[index] for draw in zero} & {draw[index] for draw in one}


def test_step_rng_restores_after_an_error() -> None:
    before = outside_streams()
    with pytest.raises(ValueError, match="planted"), step_rng(3, 4):
        raise ValueError(f"planted {torch.rand(5)} {np.random.rand()} {random.random()}")
    assert_same_bits(outside_streams(), before)


class LateNoise(torch.optim.SGD):
    """SGD that adds noise from a step on: as an option says, or by its own count."""

    def __init__(self, parameters: Any, noise: float = 0.0, quiet: int = 0) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.5)
        self.param_groups[0].update(noise=noise, quiet=quiet)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["taken"] = state.get("taken", 0) + 1
                if group["noise"] and state["taken"] > group["quiet"]:
                    parameter += group["noise"] * torch.randn_like(parameter)


def plain_step(base: torch.optim.Optimizer, closure: Any, step: int) -> None:
    with step_rng(5, step):
        closure(step)
        base.step()


@pytest.mark.parametrize("change", range(1, 6))
def test_a_base_that_the_loop_lets_draw_draws_what_the_sequential_loop_does(change: int) -> None:
    """Law 3, where steps are queued that were rolled out while nothing was drawn."""

    def run(window: int) -> list[torch.Tensor]:
        parameter, taken = torch.nn.Parameter(torch.zeros(3)), []
        base = LateNoise([parameter])
        optimizer = ParallelPicardOptimizer(base, window=max(1, window), tolerance=0, seed=5)

        def closure(step: int) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (parameter * torch.arange(3.0)).sum()
            loss.backward()
            return loss

        for t in range(12):
            if t == change:
                base.param_groups[0]["noise"] = 0.1
            if window:
                optimizer.step(closure)
            else:
                plain_step(base, closure, t)
            taken.append(parameter.detach().clone())
        assert window < 2 or max(optimizer.stats.strides) > 1
        return taken

    assert_same_bits(run(4), run(0))


def test_what_the_program_has_drawn_changes_no_run_whose_base_begins_to_draw() -> None:
    def run(outside: int) -> torch.Tensor:
        torch.manual_seed(outside)
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = ParallelPicardOptimizer(
            LateNoise([parameter], noise=0.1, quiet=20), window=8, seed=5
        )

        def closure(step: int) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (parameter - torch.randn(3)).square().sum()
            loss.backward()
            return loss

        for _ in range(40):
            optimizer.step(closure)
        return parameter.detach().clone()

    assert_same_bits([run(1)], [run(2)])
