"""accelerate: a prepared wrapper runs ahead with a closure, and is saved and loaded with the rest."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor

from picardopt import ParallelPicardOptimizer, StepIndexedLoader, step_rng
from tests.frameworks.task import (
    BATCHES,
    Network,
    assert_told_once,
    loss_of,
    make_base,
    make_loader,
    recorded,
    sequential,
    weights,
    wrap,
)
from tests.helpers.accelerated import forget
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits

STEPS = 2 * BATCHES
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def train(accelerator: Any, model: Any, optimizer: Any, steps: int, scheduler: Any = None) -> None:
    """The closure of the README, through accelerate's own ``backward`` and ``clip_grad_norm_``."""
    loader = StepIndexedLoader(make_loader())

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, loader.batch(step))
        accelerator.backward(loss)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_optimizer_runs_ahead(precision: str) -> None:
    """It is wrapped, not passed over; results are those of the sequential loop over the same model."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    expected = sequential(STEPS, accelerator.prepare)
    network = Network()
    model, optimizer = accelerator.prepare(network, wrap(make_base(network)))
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert isinstance(optimizer.optimizer, ParallelPicardOptimizer)
    train(accelerator, model, optimizer, STEPS)
    assert_same_bits(weights(network), expected)
    assert optimizer.optimizer.step_index == STEPS
    assert max(optimizer.optimizer.stats.strides) >= 2


def test_its_own_step_returns_the_loss_beside_accelerate() -> None:
    """AcceleratedOptimizer.step returns nothing; the object that was prepared does."""
    accelerator = Accelerator(cpu=True)
    network = Network()
    model, optimizer = accelerator.prepare(network, wrap(make_base(network)))
    loader = StepIndexedLoader(make_loader())

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, loader.batch(step))
        accelerator.backward(loss)
        return loss

    assert optimizer.step(closure) is None
    with step_rng(0, 1):
        expected = loss_of(model, loader.batch(1)).detach()
    assert_same_bits(optimizer.optimizer.step(closure), expected)


def test_a_prepared_scheduler_tells_future_rates() -> None:
    """The torch scheduler or accelerate's own may be given: both are stepped ahead and put back."""

    def run(given: str) -> tuple[list[Tensor], list[float], list[int]]:
        fresh_accelerator = Accelerator(cpu=True)
        network = Network()
        picard = wrap(make_base(network))
        torch_scheduler = torch.optim.lr_scheduler.ExponentialLR(picard, 0.8)
        model, optimizer, scheduler = fresh_accelerator.prepare(network, picard, torch_scheduler)
        assert isinstance(scheduler, AcceleratedScheduler)
        picard.lr_scheduler = {"torch's": torch_scheduler, "accelerate's": scheduler, "none": None}[
            given
        ]
        train(fresh_accelerator, model, optimizer, STEPS, scheduler)
        return weights(network), scheduler.get_last_lr(), picard.stats.strides

    unknown, known, prepared = run("none"), run("torch's"), run("accelerate's")
    assert_same_bits(known[:2], unknown[:2])
    assert_same_bits(prepared[:2], unknown[:2])
    assert known[1] == [pytest.approx(2e-3 * 0.8**STEPS)]
    assert len(known[2]) < len(unknown[2])
    assert prepared[2] == known[2]


def test_saved_and_loaded_with_the_rest(tmp_path: Path) -> None:
    """``save_state`` in the middle of a window, ``load_state`` into a fresh run with another window."""

    def prepared(window: int) -> tuple[Any, Any, Any]:
        accelerator, network = Accelerator(cpu=True), Network()
        return (accelerator, *accelerator.prepare(network, wrap(make_base(network), window)))

    accelerator, model, optimizer = prepared(4)
    train(accelerator, model, optimizer, 5)
    accelerator.save_state(str(tmp_path))
    with recorded():  # its loader is a new one
        train(accelerator, model, optimizer, 2)  # the old run goes on; the files must not notice
    accelerator, model, optimizer = prepared(3)
    accelerator.load_state(str(tmp_path))
    assert optimizer.optimizer.step_index == 5
    train(accelerator, model, optimizer, STEPS - 5)
    assert_same_bits(weights(model), sequential(STEPS))


def run_accumulating(wrapped: bool) -> list[Tensor]:
    """The usual loop: batches from the prepared loader, backward, a step every second one."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = Network()
    base = make_base(network)
    model, optimizer, loader = accelerator.prepare(
        network, wrap(base) if wrapped else base, make_loader()
    )
    torch.manual_seed(3)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    assert not wrapped or optimizer.optimizer.step_index == BATCHES
    return weights(network)


def test_the_usual_loop_trains_as_with_the_base() -> None:
    expected = run_accumulating(False)
    with recorded() as ours:
        got = run_accumulating(True)
    assert_same_bits(got, expected)
    assert_told_once(ours, __file__, "optimizer.step()", "without a closure")


def on_a_rank() -> tuple[list[Tensor], list[int], int]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with mock.patch.dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
    ):
        accelerator = Accelerator(cpu=True)
        network = Network()
        optimizer = accelerator.prepare(wrap(make_base(network)))
        train(accelerator, network, optimizer, STEPS)
        processes = accelerator.num_processes
        forget()
        return weights(network), optimizer.optimizer.stats.strides, processes


def test_on_two_processes_the_optimizer_alone_is_prepared(pools: Pools) -> None:
    """accelerate would wrap the model for data parallelism; the ranks share the window instead."""
    for got, strides, processes in pools(2).run(on_a_rank):
        assert processes == 2
        assert_same_bits(got, sequential(STEPS))
        assert max(strides) >= 2
