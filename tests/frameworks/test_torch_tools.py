"""Torch's own tools around an optimizer: gradient scaling and distributed checkpoints."""

import copy
from typing import Any

import pytest
import torch
from runs import Case, assert_same_bits, wrap

from picardopt import ParallelPicardOptimizer, PicardWarning, step_rng

CASE = Case("network", "Adam")


def test_gradient_scaling_without_a_closure() -> None:
    """fp16 AMP: ``scaler.step(optimizer)`` takes plain steps, scaled and unscaled as on the base."""

    def run(optimizer: Any, problem: Any) -> list[torch.Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for t in range(4):
            optimizer.zero_grad()
            with step_rng(0, t):
                scaler.scale(problem.loss(t)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in problem.parameters]

    problem, base = CASE.build()
    expected = run(base, problem)
    problem, optimizer, _ = wrap(CASE, window=3)
    with pytest.warns(PicardWarning, match="closure"):
        got = run(optimizer, problem)
    assert_same_bits(got, expected)
    assert optimizer.step_index == 4


def test_distributed_checkpointing_reads_and_writes_it() -> None:
    """``get_state_dict`` and ``set_state_dict`` see the base's state; the step is the user's."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make() -> tuple[torch.nn.Module, ParallelPicardOptimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, ParallelPicardOptimizer(
            torch.optim.Adam(model.parameters()), window=3, tolerance=0
        )

    def train(model: torch.nn.Module, optimizer: ParallelPicardOptimizer, steps: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    model, optimizer = make()
    train(model, optimizer, 5)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, optimizer, 5)
    resumed, again = make()
    # It makes the state by a plain step at rate 0, which is nothing to warn about.
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=state)
    again.step_index = 5
    train(resumed, again, 5)
    assert_same_bits(list(resumed.state_dict().values()), list(model.state_dict().values()))
