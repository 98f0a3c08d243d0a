"""The extension for threestudio, with what stands for threestudio, on Lightning itself."""

import warnings
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from picardopt import Restructure, step_rng
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.adapters import threestudio
from tests.integrations.adapters.folder import ADAPTERS, load

FOLDER = ADAPTERS / "threestudio"
STEPS = 30
BY_STEP = threestudio.Config(name="ExponentialLR", args={"gamma": 0.95}, interval="step")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*trainer. reference is not registered.*"),
]


def extension() -> Any:
    threestudio.install()
    return load("threestudio-picardopt", FOLDER / "threestudio-picardopt" / "__init__.py")


def present(system: Any) -> list[torch.Tensor]:
    return [
        *(parameter.detach() for parameter in system.parameters()),
        *system.buffers(),
        system.geometry.mask,
    ]


def sequential(scheduler: Any = None) -> tuple[list[Any], list[torch.Tensor]]:
    """What threestudio does in a step, in its order, each step under its own randomness."""
    system, loader = threestudio.System(), threestudio.make_loader()
    optimizer = system.configure_optimizers()
    rates = threestudio.parse_scheduler(scheduler, optimizer)["scheduler"] if scheduler else None
    losses = []
    for step in range(STEPS):
        with step_rng(0, step):
            system.set_resume_status(0, step)
            threestudio.update_if_possible(loader.dataset, 0, step)
            system.do_update_step(0, step)
            batch = loader.dataset.collate({})
            system.preprocess_data(batch, "train")
            optimizer.zero_grad()
            loss = system.training_step(batch, step)["loss"]
            loss.backward()
            optimizer.step()
        if rates:
            rates.step()
        losses.append(loss.detach())
    return losses, present(system)


class Journal(lightning.Callback):
    """Writes down what Lightning logged at each step."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.weights: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(outputs["loss"])
        self.weights.append(float(trainer.callback_metrics["train_params/weight"]))


def make_system(scheduler: Any = None, **picard: Any) -> Any:
    extension()
    return threestudio.find("dreamfusion-system:picard")(picard, scheduler)


def fit(scheduler: Any = None, **picard: Any) -> tuple[Any, Journal]:
    system, journal = make_system(scheduler, **picard), Journal()
    train(system, callbacks=[journal])
    return system, journal


def train(system: Any, **options: Any) -> None:
    torch.manual_seed(3)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(system, threestudio.make_loader())
    assert trainer.global_step == STEPS


@pytest.mark.parametrize("scheduler", [None, BY_STEP], ids=["constant rate", "falling rate"])
@pytest.mark.parametrize("window", [1, 4])
def test_at_tolerance_0_every_bit_is_the_sequential_one(window: int, scheduler: Any) -> None:
    expected_losses, expected = sequential(scheduler)
    system, journal = fit(scheduler, window=window, tolerance=0)
    assert_same_bits(journal.losses, expected_losses)
    assert_same_bits(present(system), expected)
    stats = system.optimizers().optimizer.stats
    assert stats.steps == STEPS
    assert stats.outer_changes == 0
    if window > 1:
        assert max(stats.strides) > 2
        assert stats.sweeps < 0.75 * STEPS


def test_what_is_logged_is_that_of_the_step_taken() -> None:
    _, journal = fit(window=8, tolerance=float("inf"))
    weights = [0.2 + 0.05 * step for step in range(STEPS)]
    assert journal.weights == pytest.approx(weights)


def test_the_levels_of_a_later_step_are_not_seen_earlier() -> None:
    """In a window that runs across steps 9 and 18, where levels are added."""
    system, _ = fit(window=8, tolerance=0)
    starts = {record.step for record in system.optimizers().optimizer.stats.records}
    assert not {9, 18} <= starts
    assert system.geometry.mask.sum() == 5


def fit_on_a_rank() -> Any:
    with warnings.catch_warnings():  # the marks above are not this process's
        warnings.filterwarnings("ignore", module="lightning")
        system, journal = fit(tolerance=0)
    return journal.losses, present(system), system.optimizers().optimizer.stats.strides


@pytest.mark.slow
def test_two_processes_share_the_window(pools: Pools) -> None:
    expected_losses, expected = sequential()
    for losses, result, strides in pools(2).run(fit_on_a_rank):
        assert_same_bits(losses, expected_losses)
        assert_same_bits(result, expected)
        assert max(strides) == 2


class Changing(threestudio.System):
    """Says that something changes after step 9."""

    def picard_options(self) -> dict[str, Any]:
        return {"restructure": Restructure(lambda step: None, due=lambda step: step == 9)}


def test_a_system_names_options_of_its_own() -> None:
    kind = type("Changing:picard", (extension().PicardSystem, Changing), {})
    system = kind({"window": 8, "tolerance": float("inf")})
    train(system)
    records = system.optimizers().optimizer.stats.records
    assert 10 in {record.step + record.slots for record in records}
    assert 10 not in {step for r in records for step in range(r.step + 1, r.step + r.slots)}


def test_a_trainer_that_scales_gradients_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="take bf16-mixed or 32"):
        train(make_system(), plugins=[plugin])


def test_an_estimator_that_is_trained_is_refused() -> None:
    system = make_system()
    del system.renderer.estimator.occs
    with pytest.raises(ValueError, match="Grid steps an optimizer of its own"):
        train(system)
