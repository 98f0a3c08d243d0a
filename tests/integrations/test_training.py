"""The trainings of the shipped models: one loop, five models, each at a tiny size from command to stock classes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from picardopt_3d.compat import CLIPTokenizer
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.zero123_pipeline import Zero123Pipeline
from picardopt_3d.training.autoencoder import AutoencoderConfig, AutoencoderTrainer
from picardopt_3d.training.clip import ClipConfig, ClipTrainer
from picardopt_3d.training.evaluate import evaluation_of, main
from picardopt_3d.training.latent_text_to_view import (
    LatentTextToViewConfig,
    LatentTextToViewTrainer,
)
from picardopt_3d.training.loop import Trainer, run
from picardopt_3d.training.models import TextSizes, UNetSizes, VisionSizes
from picardopt_3d.training.tables import EvaluationConfig
from picardopt_3d.training.text_to_view import TextToViewConfig, TextToViewTrainer
from picardopt_3d.training.zero123 import Zero123Config, Zero123Trainer
from transformers import CLIPModel

from tests.helpers.versions import needs_transformers_5

pytestmark = needs_transformers_5

UNET = UNetSizes((8, 16), (False, True), heads=2, embedding=16)
TEXT = TextSizes(channels=16, layers=1, heads=2)
VISION = VisionSizes(size=16, patch=8, channels=16, layers=1, heads=2, embedding=16)
LOOP: dict[str, Any] = {"batch": 4, "views": 4, "warmup": 2, "images": 16, "sample_steps": 2}

Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views at 16 pixels, rendered once, and a tiny autoencoder after four steps."""
    folder = tmp_path_factory.mktemp("shared")
    settings = LOOP | {"out": folder, "size": 16, "channels": (8, 16)}
    run(AutoencoderTrainer(AutoencoderConfig(**settings)))
    return folder


@pytest.fixture(params=["pixels", "autoencoder", "latents", "zero123", "clip"])
def make(request: pytest.FixtureRequest, shared: Path) -> Make:
    """Makes a trainer of each kind for a folder and changed options."""
    wide = {"views_file": shared / "views.pt"}
    latent = {"vae": shared / "pipeline", "unet": UNET}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "pixels": (TextToViewTrainer, TextToViewConfig, {"size": 16, "unet": UNET, "text": TEXT}),
        "autoencoder": (AutoencoderTrainer, AutoencoderConfig, {"size": 16, "channels": (8, 16)}),
        "latents": (LatentTextToViewTrainer, LatentTextToViewConfig, latent | {"text": TEXT}),
        "zero123": (Zero123Trainer, Zero123Config, latent | {"vision": VISION}),
        "clip": (ClipTrainer, ClipConfig, {"vision": VISION, "text": TEXT}),
    }
    trainer, config, options = kinds[request.param]
    if request.param == "zero123":  # its cameras have one field of view
        wide = {"views_file": shared / "zero123.pt"}
    return lambda out, **changes: trainer(config(out=out, **(LOOP | wide | options | changes)))


def clip(out: Path, shared: Path, **changes: Any) -> Trainer:
    options = LOOP | {"views_file": shared / "views.pt"} | changes
    return ClipTrainer(ClipConfig(out=out, vision=VISION, text=TEXT, **options))


def steps(trainer: Trainer, count: int) -> Trainer:
    for _ in range(count):
        trainer.step()
    return trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [*trainer.parameters, *trainer.ema.shadow_params]


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(make: Make, tmp_path: Path) -> None:
    whole = steps(make(tmp_path / "whole"), 4)
    cut = steps(make(tmp_path / "cut"), 2)
    cut.save()
    steps(cut, 1)  # lost
    (tmp_path / "cut" / "checkpoint.partial").write_bytes(b"half a checkpoint")
    resumed = make(tmp_path / "cut")
    assert resumed.resume()
    assert resumed.images == 8
    steps(resumed, 2)
    assert resumed.losses == whole.losses
    assert resumed.progress == 1
    for mine, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="other settings"):
        make(tmp_path / "cut", lr=3e-3).resume()


@pytest.mark.slow
def test_from_command_to_figures(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaves, resumes, ends its budget, writes a folder that stock classes load, and that is evaluated."""
    run(make(tmp_path, stop_after=2))
    trainer = make(tmp_path)
    run(trainer)
    assert json.loads((tmp_path / "training.json").read_text())["images"] == trainer.images == 16
    for picture in ("samples.png", "loss.png"):
        assert (tmp_path / picture).stat().st_size > 500
    folder = tmp_path / "pipeline"
    load: dict[type, Callable[[], dict[str, Any]]] = {
        TextToViewTrainer: lambda: vars(PixelDiffusion.from_pretrained(folder)),
        AutoencoderTrainer: lambda: {"vae": AutoencoderKL.from_pretrained(folder)},
        LatentTextToViewTrainer: lambda: StableDiffusionPipeline.from_pretrained(folder).components,
        Zero123Trainer: lambda: Zero123Pipeline.from_pretrained(folder).components,
        ClipTrainer: lambda: {
            "clip": CLIPModel.from_pretrained(folder),
            "tokenizer": CLIPTokenizer.from_pretrained(folder),
        },
    }
    parts = load[type(trainer)]()
    # What was exported is the average, in half precision; training went on from the weights themselves.
    averages = iter(trainer.ema.shadow_params)
    for name, module in trainer.modules.items():
        loaded = parts.get(name) if name in parts else getattr(parts["pipeline"], name)
        for exported, average in zip(
            loaded.parameters(), [next(averages) for _ in module.parameters()], strict=True
        ):
            torch.testing.assert_close(exported.float(), average, atol=1e-3, rtol=1e-3)
    if not isinstance(trainer, AutoencoderTrainer):
        capsys.readouterr()
        main(EvaluationConfig(folder, levels=(500,), every=32, views=2, sample_steps=2))
        assert "| --- |" in capsys.readouterr().out


@pytest.mark.slow
def test_training_learns(make: Make, tmp_path: Path) -> None:
    """Over some steps of a fixed learning rate the loss falls, in every model."""
    trainer = steps(make(tmp_path, images=10**9, lr=3e-3, batch=8), 40)
    assert sum(trainer.losses[-10:]) < 0.97 * sum(trainer.losses[:10])


@pytest.mark.slow
def test_training_goes_on_from_a_trained_model(make: Make, tmp_path: Path) -> None:
    first = make(tmp_path / "first", seed=1)
    first.export()
    second = make(tmp_path / "second", start=tmp_path / "first" / "pipeline")
    for mine, theirs in zip(second.parameters, first.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(shared: Path, tmp_path: Path) -> None:
    trainer = clip(tmp_path, shared, images=10**6)
    with torch.no_grad():
        trainer.parameters[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="--lr"):
        run(trainer)


def test_a_budget_of_minutes_ends_a_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by 0.1 s at each look, of which a step takes two."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.1 * next(looks))
    monkeypatch.setattr("picardopt_3d.training.loop.time", clock)
    trainer = clip(tmp_path, shared, images=10**9, minutes=0.01)
    run(trainer)
    assert trainer.steps == 4
    assert trainer.seconds == pytest.approx(0.7)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TextToViewPipeline"):
        evaluation_of(tmp_path)
