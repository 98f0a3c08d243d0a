"""Lightning: automatic optimization trains as with the base, manual optimization with a closure runs ahead."""

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from picardopt import Carry, ParallelPicardOptimizer, StepIndexedLoader
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
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits

pytestmark = [
    # Of Lightning's own code: it asks torch for what torch renamed.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*"),
]


class Journal:
    """What a run writes down."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []


class Module(lightning.LightningModule):
    """The task; `window` 0 leaves the base as it is."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.network, self.window, self.journal = Network(), window, Journal()

    @property
    def losses(self) -> list[torch.Tensor]:
        """Grows at every step, where a closure over `self` does not see it."""
        return self.journal.losses

    def configure_optimizers(self) -> Any:
        base = make_base(self.network)
        optimizer = wrap(base, self.window) if self.window else base
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @property
    def own_optimizer(self) -> Any:
        return self.optimizers(use_pl_optimizer=False)


class Automatic(Module):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = loss_of(self.network, batch)
        self.losses.append(loss.detach())
        return loss


class Manual(Module):
    """Backward has run when ``step`` is called."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = loss_of(self.network, batch)
        self.losses.append(loss.detach())
        self.manual_backward(loss)
        optimizer.step()


class ByStep(Manual):
    """A closure that takes its batch by step."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.loader = StepIndexedLoader(make_loader())

    def configure_optimizers(self) -> Any:
        return wrap(make_base(self.network), self.window)

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        self.journal.losses.append(optimizer.step(self.make_closure(optimizer, batch)))

    def make_closure(self, optimizer: Any, batch: Any) -> Any:
        def closure(step: int) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.network, self.loader.batch(step))
            self.manual_backward(loss)
            return loss

        return closure


class ByIterator(ByStep):
    """The closure sees the batch that the trainer took from its iterator: another one at each step."""

    def configure_optimizers(self) -> Any:
        base = make_base(self.network)
        return ParallelPicardOptimizer(base, window=self.window, tolerance=float("inf"))

    def make_closure(self, optimizer: Any, batch: Any) -> Any:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.network, batch)
            self.manual_backward(loss)
            return loss

        return closure


def fit(module: Module, epochs: int = 2, start: str | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, make_loader(), ckpt_path=start)
    return trainer


def half_precision() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


OPTIONS = {
    "plain": dict,
    "clipping and accumulation": lambda: {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    "bfloat16": lambda: {"precision": "bf16-mixed"},
    "float16": half_precision,
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_what_cannot_run_ahead_trains_as_with_the_base(kind: Any, options: str) -> None:
    """Bitwise, the trainer's own randomness included, and told once at the user's line."""
    if kind is Manual and options.startswith("clipping"):
        pytest.skip("Lightning has neither in manual optimization")
    expected, got = kind(window=0), kind(window=4)
    reference = fit(expected, **OPTIONS[options]())
    with recorded() as ours:
        trainer = fit(got, **OPTIONS[options]())
    assert_same_bits(weights(got), weights(expected))
    assert_same_bits(got.losses, expected.losses)
    assert_same_bits(got.own_optimizer.base.state_dict(), expected.own_optimizer.state_dict())
    assert trainer.global_step == reference.global_step == got.own_optimizer.step_index
    assert got.own_optimizer.stats.sweeps == 0
    if (
        kind is Automatic and options != "float16"
    ):  # with a scaler it calls step() without a closure
        assert_told_once(ours, __file__, "trainer.fit(", "automatic_optimization = False")
    else:
        line = "optimizer.step()" if kind is Manual else "trainer.fit("
        assert_told_once(ours, __file__, line, "without a closure")


class Averaging(Automatic):
    """Carries an average of the losses, which its `Carry` updates from what the closure returns."""

    def configure_optimizers(self) -> Any:
        self.average = torch.zeros(())
        carry = Carry([self.average], lambda loss: self.average.lerp_(loss, 0.5))
        return wrap(make_base(self.network), self.window, carry=carry)


def test_a_carry_is_updated_where_nothing_runs_ahead() -> None:
    module, expected = Averaging(window=4), torch.zeros(())
    with recorded():
        fit(module)
    for loss in module.losses:
        expected.lerp_(loss, 0.5)
    assert_same_bits(module.average, expected)


def test_manual_optimization_with_a_closure_by_step_runs_ahead() -> None:
    """The closure gets its step through Lightning's own wrapping; steps are counted; nothing is warned about."""
    module = ByStep(window=4)
    with recorded() as ours:
        trainer = fit(module)
    assert not ours
    assert_same_bits(weights(module), sequential(2 * BATCHES))
    assert trainer.global_step == module.own_optimizer.step_index == 2 * BATCHES
    assert max(module.own_optimizer.stats.strides) >= 2
    assert len(module.losses) == 2 * BATCHES


def fit_on_a_rank() -> tuple[list[torch.Tensor], list[int]]:
    module = ByStep(window=2)
    with warnings.catch_warnings():  # the marks above are not this process's
        warnings.filterwarnings("ignore", module="lightning")
        fit(module)
    return weights(module), module.own_optimizer.stats.strides


def test_on_two_processes_each_trainer_sees_one_device(pools: Pools) -> None:
    """The processes share the window, so Lightning is not told of the others."""
    for got, strides in pools(2).run(fit_on_a_rank):
        assert_same_bits(got, sequential(2 * BATCHES))
        assert max(strides) == 2


def test_a_closure_over_the_trainers_batch_is_seen_to_change() -> None:
    """Right though the tolerance accepts everything, but nothing runs ahead; the warning names the batch."""
    module, expected = ByIterator(window=4), ByIterator(window=1)
    with recorded() as ours:
        fit(module)
        fit(expected)
    assert_same_bits(weights(module), weights(expected))
    assert any("`batch" in str(warning.message) for warning in ours)
    assert module.own_optimizer.stats.outer_changes >= BATCHES


def resumed(kind: Any, window: int, again: int, file: Path) -> Any:
    """One epoch, saved and loaded into a fresh module, and one more."""
    first, second = kind(window), kind(again)
    fit(first, epochs=1).save_checkpoint(file)
    fit(second, start=str(file))
    return second


def test_a_run_resumes_from_lightnings_checkpoint(tmp_path: Path) -> None:
    """With another window; the step, the seed and the tolerance travel in the optimizer's state."""
    module = resumed(ByStep, 4, 3, tmp_path / "epoch.ckpt")
    assert module.own_optimizer.step_index == 2 * BATCHES
    assert_same_bits(weights(module), sequential(2 * BATCHES))
    assert max(module.own_optimizer.stats.strides) >= 2


def test_automatic_optimization_resumes_as_with_the_base(tmp_path: Path) -> None:
    expected = resumed(Automatic, 0, 0, tmp_path / "base.ckpt")
    with recorded():
        got = resumed(Automatic, 4, 4, tmp_path / "wrapped.ckpt")
    assert_same_bits(weights(got), weights(expected))
    assert got.own_optimizer.step_index == 2 * BATCHES
