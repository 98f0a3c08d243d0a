"""The shipped latent, Zero-1-to-3 and CLIP models: complete, small, and as good as their cards say."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from picardopt_3d.guidance.pixel_diffusion import SHIPPED
from picardopt_3d.guidance.zero123_pipeline import Zero123Pipeline
from picardopt_3d.training.evaluate_clip import ClipJudge, r_precision
from picardopt_3d.training.evaluate_latent import (
    latent_denoising,
    zero123_denoising,
    zero123_sampling,
)
from picardopt_3d.training.tables import EvaluationConfig
from picardopt_3d.world import all_subjects, held_out_subjects
from safetensors import safe_open

WEIGHTS = SHIPPED.parent


def test_the_family_is_small_and_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 20_000_000
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("name", ["text-to-view", "latent-text-to-view", "zero123", "clip"])
def test_every_model_has_a_card_with_pictures(name: str) -> None:
    card = (WEIGHTS / name / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0")
    for needed in ("loss.png", "samples.png", "python -m picardopt_3d.training.", "--seed", "dB"):
        assert needed in card or (needed == "dB" and name == "clip")
    for picture in WEIGHTS.joinpath(name).glob("*.png"):
        assert picture.name in card


@pytest.mark.slow
@torch.no_grad()
def test_the_latent_model_knows_prompts_and_view_words() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        WEIGHTS / "latent-text-to-view", low_cpu_mem_usage=False, dtype=torch.float32
    )
    config = EvaluationConfig(levels=(700,), views=3)
    for subjects in (all_subjects()[::9], held_out_subjects()):
        kept, [(_, (right, no_caption, wrong_words))] = latent_denoising(pipeline, config, subjects)
        assert kept > 31
        assert right > no_caption + 1
        assert right > wrong_words + 1


@pytest.mark.slow
@torch.no_grad()
def test_the_zero123_twin_finds_new_views() -> None:
    pipeline = Zero123Pipeline.from_pretrained(
        WEIGHTS / "zero123", low_cpu_mem_usage=False, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    config = EvaluationConfig(levels=(850,), views=2, sample_steps=10, scales=(3.0,))
    subjects = all_subjects()[4::18]
    [(_, (right, nothing, wrong_pose))] = zero123_denoising(pipeline, config, subjects)
    assert right > nothing + 5
    assert right > wrong_pose + 5
    [(_, (sampled,))] = zero123_sampling(pipeline, config, subjects)
    assert sampled > 20


def test_the_clip_model_tells_all_64_apart() -> None:
    config = EvaluationConfig(every=1, views=4)
    single, whole = r_precision(ClipJudge(WEIGHTS / "clip"), config, blur=2)
    assert single > 0.95
    assert whole >= 0.98
