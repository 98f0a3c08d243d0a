"""Torch's own tools around an optimizer: mixed precision, averages, distributed checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from picardopt import ImpureClosureError, StepIndexedLoader, step_rng
from tests.frameworks.task import (
    BATCHES,
    Network,
    Normalized,
    assert_told_once,
    loss_of,
    make_base,
    make_loader,
    recorded,
    run_ahead,
    sequential,
    weights,
    wrap,
)
from tests.helpers.pool import Pools
from tests.helpers.runs import Case, assert_same_bits, quiet
from tests.helpers.runs import wrap as wrap_case

STEPS = 2 * BATCHES
CASE = Case("network", "Adam")
SCALE = 2.0**12


# -- mixed precision --------------------------------------------------------------------------------


def autocast(model: nn.Module) -> Any:
    def called(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return called


def test_bfloat16_autocast_in_the_closure() -> None:
    model = Network()
    optimizer = wrap(make_base(model))
    run_ahead(model, optimizer, called=autocast(model))
    assert_same_bits(weights(model), sequential(STEPS, autocast))
    assert not torch.equal(weights(model)[0], sequential(STEPS)[0])
    assert max(optimizer.stats.strides) >= 2


def test_gradient_scaling_without_a_closure() -> None:
    """fp16 AMP: ``scaler.step(optimizer)`` takes plain steps, scaled and unscaled as on the base."""

    def run(optimizer: Any, problem: Any) -> tuple[list[Tensor], float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)
        for t in range(8):
            optimizer.zero_grad()
            with step_rng(0, t):
                scaler.scale(problem.loss(t)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in problem.parameters], scaler.get_scale()

    problem, base = CASE.build()
    expected = run(base, problem)
    problem, optimizer, _ = wrap_case(CASE, window=3)
    with recorded() as ours:
        got = run(optimizer, problem)
    assert_same_bits(got, expected)
    assert 0 < optimizer.step_index < 8  # the first ones overflowed, and the scaler left them out
    assert_told_once(ours, __file__, "scaler.step(optimizer)")


def unscale_in_the_closure(window: int) -> tuple[Any, Any]:
    """Torch does not support it with closures; a plain loop may get away with it."""
    model = Network()
    base = make_base(model)
    optimizer = wrap(base, window) if window else base
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    loader = StepIndexedLoader(make_loader())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, loader.batch(0))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return loss

    for t in range(4):
        if window:
            optimizer.step(closure)
        else:
            with step_rng(0, t):
                optimizer.step(closure)
        scaler.update()
    return weights(model), optimizer


def test_a_scaler_in_the_closure_is_refused_at_once() -> None:
    with pytest.raises(ImpureClosureError, match=r"GradScaler.*bfloat16.*nonfinite.*scaler\.step"):
        unscale_in_the_closure(4)


def refusal() -> str:
    with pytest.raises(ImpureClosureError) as caught:
        unscale_in_the_closure(2)
    return str(caught.value)


def test_a_scaler_in_the_closure_is_refused_on_every_rank(pools: Pools) -> None:
    """Else each rank's scaler would learn of another step's gradient, and the second update() fail."""
    assert all("GradScaler" in text for text in pools(2).run(refusal))


def test_a_scaler_in_the_closure_of_a_window_of_one() -> None:
    """Nothing runs ahead there, so the scaler works as it does with the base."""
    got, optimizer = unscale_in_the_closure(1)
    expected, _ = unscale_in_the_closure(0)
    assert_same_bits(got, expected)
    assert optimizer.step_index == 4


def test_a_constant_scale_in_the_closure() -> None:
    """The remedy that the refusal names: fp16 autocast, and steps that overflow are left out."""

    def make_closure(model: nn.Module, zero_grad: Any) -> Any:
        loader = StepIndexedLoader(make_loader())

        def closure(step: int) -> Tensor:
            zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, loader.batch(step))
            scale = torch.inf if step == 5 else SCALE  # an overflow, planted
            (loss * scale).backward()
            for p in model.parameters():
                p.grad /= SCALE
            return loss

        return closure

    model = Network()
    base = make_base(model)
    closure = make_closure(model, base.zero_grad)
    for t in range(STEPS):
        with step_rng(0, t):
            closure(t)
            if t != 5:
                base.step()
    expected, model = weights(model), Network()
    optimizer = wrap(make_base(model), nonfinite="skip")
    closure = make_closure(model, optimizer.zero_grad)
    with quiet():
        for _ in range(STEPS):
            optimizer.step(closure)
    assert_same_bits(weights(model), expected)
    assert max(optimizer.stats.strides) >= 2


# -- accumulation, averages -----------------------------------------------------------


def test_gradients_accumulate_in_the_closure() -> None:
    """Three backward passes a step; the closure returns their mean loss."""

    def make_closure(model: nn.Module, zero_grad: Any) -> Any:
        loader = StepIndexedLoader(make_loader())

        def closure(step: int) -> Tensor:
            zero_grad()
            total = torch.zeros(())
            for part in range(3):
                loss = loss_of(model, loader.batch(3 * step + part)) / 3
                loss.backward()
                total += loss.detach()
            return total

        return closure

    model = Network()
    base = make_base(model)
    closure, losses = make_closure(model, base.zero_grad), []
    for t in range(STEPS):
        with step_rng(0, t):
            losses.append(closure(t))
            base.step()
    expected, model = weights(model), Network()
    optimizer = wrap(make_base(model))
    closure = make_closure(model, optimizer.zero_grad)
    assert_same_bits([optimizer.step(closure) for _ in range(STEPS)], losses)
    assert_same_bits(weights(model), expected)
    assert max(optimizer.stats.strides) >= 2


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_weights_in_the_loop(average: str) -> None:
    """AveragedModel, SWALR and update_bn see every step's weights, as without the wrapper."""

    def run(wrapped: bool) -> tuple[list[Tensor], Any]:
        model = Normalized()
        optimizer = wrap(make_base(model), carry=model) if wrapped else make_base(model)
        averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if average == "ema" else None
        )
        scheduler = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=4)
        if wrapped:
            optimizer.lr_scheduler = scheduler
        loader = StepIndexedLoader(make_loader())

        def closure(step: int) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, loader.batch(step))
            loss.backward()
            return loss

        for t in range(STEPS):
            if wrapped:
                optimizer.step(closure)
            else:
                with step_rng(0, t):
                    closure(t)
                    optimizer.step()
            if t >= 3:
                averaged.update_parameters(model)
            scheduler.step()
        torch.manual_seed(0)
        update_bn(make_loader(), averaged)
        return list(averaged.state_dict().values()), optimizer

    got, optimizer = run(True)
    assert_same_bits(got, run(False)[0])
    assert max(optimizer.stats.strides) >= 2


# -- distributed checkpoints -----------------------------------------------------------------------------


def test_distributed_checkpointing_reads_and_writes_it() -> None:
    """``get_state_dict`` and ``set_state_dict`` see the base's state; the step is the user's."""
    model = Network()
    optimizer = wrap(make_base(model))
    run_ahead(model, optimizer, 5)
    saved, state = copy.deepcopy(get_state_dict(model, optimizer))
    with recorded():  # its loader is a new one
        run_ahead(model, optimizer, 2)  # the old run goes on
    resumed = Network()
    again = wrap(make_base(resumed), 3)
    with recorded() as ours:
        set_state_dict(resumed, again, model_state_dict=saved, optim_state_dict=state)
    assert not ours  # it makes the state by a plain step at rate 0: nothing to tell
    again.step_index = 5
    run_ahead(resumed, again, STEPS - 5)
    assert_same_bits(weights(resumed), sequential(STEPS))


# What saves without a process group is told that it does.
@pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch 2.4 itself
def test_distributed_checkpoint_files(tmp_path: Path) -> None:
    """Through its own writer and reader, with the step beside the two state dicts."""
    model = Network()
    optimizer = wrap(make_base(model))
    run_ahead(model, optimizer, 5)
    saved, state = get_state_dict(model, optimizer)
    everything = {"model": saved, "optimizer": state, "step": optimizer.step_index}
    dcp.save(everything, checkpoint_id=str(tmp_path))
    resumed = Network()
    again = wrap(make_base(resumed), 3)
    saved, state = get_state_dict(resumed, again)
    everything = {"model": saved, "optimizer": state, "step": 0}
    dcp.load(everything, checkpoint_id=str(tmp_path))
    set_state_dict(resumed, again, model_state_dict=saved, optim_state_dict=state)
    again.step_index = everything["step"]
    run_ahead(resumed, again, STEPS - 5)
    assert_same_bits(weights(resumed), sequential(STEPS))
