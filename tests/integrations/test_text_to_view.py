"""The pixel pipeline: folders in the hub's format, the score model over them, and the one that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.compat import CLIPTokenizer
from picardopt_3d.guidance import ExactScore, RenderedSubjects, ScoreDistillation, ScoreModel
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.text_to_view import TextToViewPipeline
from picardopt_3d.prompts import TextPrompt
from picardopt_3d.training.evaluate_pixels import denoising
from picardopt_3d.training.models import TextSizes, UNetSizes
from picardopt_3d.training.tables import EvaluationConfig
from picardopt_3d.training.text_to_view import (
    TextToViewConfig,
    build_pipeline,
    save_half_precision,
)
from picardopt_3d.world import all_subjects, held_out_subjects
from transformers import CLIPTextModel

from tests.helpers.versions import needs_transformers_5

pytestmark = needs_transformers_5

TINY = TextToViewConfig(
    out=Path("unused"),
    size=16,
    unet=UNetSizes((8, 16), (False, True), heads=2, embedding=16),
    text=TextSizes(channels=16, layers=1),
)
CAPTIONS = [text for subject in all_subjects() for text in subject.captions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline in the hub's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "pipeline"
    build_pipeline(TINY).save_pretrained(path)
    return path


def test_the_parts_are_stock_classes(folder: Path) -> None:
    UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    CLIPTextModel.from_pretrained(folder / "text_encoder")
    CLIPTokenizer.from_pretrained(folder / "tokenizer")
    DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = TextToViewPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    views = pipeline(["a red cube"] * 2, turntable_cameras(2), num_inference_steps=2)
    assert views.shape == (2, 3, 16, 16)
    assert 0 <= views.min() <= views.max() <= 1


def test_words_are_single_tokens_and_others_are_spelled(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for caption in CAPTIONS:
        words = caption.replace("3d", "3 d")  # CLIP's own rule: digits stand alone
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(words.split()) + 2
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == words
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode zebra").input_ids[1:-1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_noise_is_what_the_model_implies(folder: Path, prediction: str) -> None:
    score = PixelDiffusion.from_pretrained(folder)
    assert isinstance(score, ScoreModel)
    score.prediction_type = prediction
    cameras, prompt = (
        random_cameras(2),
        score.encode(TextPrompt("a red cube", negative="a blue mug")),
    )
    noisy, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([100, 800])
    predicted = score.predict_noise(noisy, timesteps, prompt, cameras)
    for text, noise in zip(("a red cube", "a blue mug"), predicted[:2], strict=True):
        embedding = score.pipeline.encode([text] * 2)
        raw = score.unet(noisy, timesteps, embedding, class_labels=cameras.condition()).sample
        abar = score.alphas_cumprod[timesteps].view(2, 1, 1, 1)
        if prediction == "epsilon":
            expected = raw
        elif (
            prediction == "v_prediction"
        ):  # v = sqrt(abar) noise - sqrt(1 - abar) view: solve for the noise
            view = abar.sqrt() * noisy - (1 - abar).sqrt() * raw
            expected = (noisy - abar.sqrt() * view) / (1 - abar).sqrt()
        else:
            expected = (noisy - abar.sqrt() * raw) / (1 - abar).sqrt()
        torch.testing.assert_close(noise, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_views_and_not_the_model(folder: Path) -> None:
    score = PixelDiffusion.from_pretrained(folder)
    guidance = ScoreDistillation(score)
    views = torch.rand(2, 3, 16, 16, requires_grad=True)
    guidance(views, guidance.encode("a red cube"), random_cameras(2)).backward()
    assert views.grad is not None
    assert views.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in score.unet.parameters())


def test_texts_are_encoded_once(folder: Path) -> None:
    score = PixelDiffusion.from_pretrained(folder)
    first = score.encode("a red cube")
    with torch.no_grad():
        for parameter in score.pipeline.text_encoder.parameters():
            parameter.zero_()
    assert torch.equal(first.conditional, score.encode("a red cube").conditional)
    assert not torch.equal(first.conditional, score.encode("a blue cube").conditional)


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder.*hub id"):
        PixelDiffusion.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        PixelDiffusion.from_pretrained(folder / "unet")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline.*TextToViewPipeline"):
        PixelDiffusion.from_pretrained(tmp_path)
    latent = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )
    pipeline = TextToViewPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.register_modules(unet=latent)
    with pytest.raises(ValueError, match="RGB"):
        PixelDiffusion(pipeline)


def test_half_precision_leaves_the_pipeline_as_it_was(folder: Path, tmp_path: Path) -> None:
    pipeline = TextToViewPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    save_half_precision(pipeline, tmp_path)
    assert all(p.dtype == torch.float32 for p in pipeline.unet.parameters())
    half = PixelDiffusion.from_pretrained(tmp_path)
    for mine, theirs in zip(half.unet.parameters(), pipeline.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs.half().float())


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_shipped_model_knows_views_and_prompts(every: int) -> None:
    """It denoises true views far better than without the caption or with a wrong camera, also of what it never saw."""
    score = PixelDiffusion.from_pretrained()
    config = EvaluationConfig(views=4)
    for subjects in (all_subjects()[::9][::every], held_out_subjects()[::every]):
        found = denoising(score, 850, config, subjects)
        assert found.right > 28
        assert found.right > found.no_caption + 5
        assert found.right > found.wrong_camera + 10


def test_a_perfect_model_denoises_perfectly() -> None:
    """The evaluation itself, on a score whose answers are known."""
    found = denoising(
        ExactScore(RenderedSubjects(size=16)), 700, EvaluationConfig(every=30, views=2)
    )
    assert found.right > 60
    assert found.right > found.wrong_camera + 20
