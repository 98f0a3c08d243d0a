"""Every guidance is one joined call: the gradient it had before, and rows that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras
from picardopt_3d.guidance import (
    DenoiseConfig,
    Encoded,
    ExactScore,
    KnownViews,
    RenderedSubjects,
    ScoreDistillation,
    ScoreModel,
    SdsConfig,
    VsdConfig,
)
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.denoise import Denoising, refined_views
from picardopt_3d.guidance.draws import draw_timesteps
from picardopt_3d.guidance.joinable import JoinableScore, draw_for, with_gradient
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.loss_config import WEIGHTINGS
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.sds import (
    clip_gradient,
    gradient_of_views,
    guided_noise,
)
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.vsd import VSD, pretrained_noise
from picardopt_3d.guidance.zero123 import Zero123
from picardopt_3d.prompts import ImagePrompt, PerpNeg, TextPrompt, ViewWords
from picardopt_3d.world import Subject
from torch import Tensor

from picardopt import batched
from tests.integrations.helpers.tiny_pipelines import (
    save_deepfloyd,
    save_stable_diffusion,
    save_zero123,
)

IN_MEMORY = ModelOptions(embeddings=None)
SUBJECTS = [Subject("cube", "red"), Subject("cube", "green")]
WORDS = TextPrompt("a red cube", "ugly", views=ViewWords())
PUSHED = replace(WORDS, perp_neg=PerpNeg())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {
        "epsilon": save_stable_diffusion(root / "epsilon"),
        "velocity": save_stable_diffusion(root / "velocity", "v_prediction"),
        "deepfloyd": save_deepfloyd(root / "deepfloyd"),
        "zero123": save_zero123(root / "zero123"),
    }


def pictures(count: int, size: int, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def picture() -> ImagePrompt:
    return ImagePrompt(pictures(1, 16)[0], orbit_cameras(10.0, 20.0))


def known_views() -> ExactScore:
    cameras = orbit_cameras(torch.tensor([0.0, 30.0]), torch.tensor([0.0, 90.0]))
    return ExactScore(KnownViews(pictures(2, 16), cameras, ["a red cube"] * 2, bandwidth=90.0))


Loaded = tuple[ScoreModel, Any]

MODELS: dict[str, Callable[[dict[str, Path]], Loaded]] = {
    "pixels": lambda _: (PixelDiffusion.from_pretrained(), "a red cube"),
    "exact": lambda _: (ExactScore(RenderedSubjects(SUBJECTS, 16)), "a red cube"),
    "known views": lambda _: (known_views(), "a red cube"),
    "stable diffusion": lambda f: (
        StableDiffusion.from_pretrained(f["epsilon"], options=IN_MEMORY),
        WORDS,
    ),
    "velocity, perp-neg": lambda f: (
        StableDiffusion.from_pretrained(f["velocity"], options=IN_MEMORY),
        PUSHED,
    ),
    "sliced": lambda f: (
        StableDiffusion.from_pretrained(
            f["epsilon"], options=ModelOptions(embeddings=None, vae_slicing=True)
        ),
        WORDS,
    ),
    "deepfloyd": lambda f: (
        DeepFloyd.from_pretrained(f["deepfloyd"], options=IN_MEMORY),
        PUSHED,
    ),
    "zero123": lambda f: (Zero123.from_pretrained(f["zero123"]), picture()),
}


@pytest.fixture(params=MODELS)
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Loaded:
    return MODELS[request.param](folders)


def cameras_of(count: int, seed: int = 3) -> Cameras:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return random_cameras(count)


# -- the gradient that it was ---------------------------------------------------------------------------------


def through_autograd(
    guidance: ScoreDistillation, views: Tensor, prompt: Encoded, cameras: Cameras
) -> Tensor:
    """The loss as it was before calls could be joined: autograd takes the gradient through the VAE."""
    score, config = guidance.score, guidance.config
    clean = score.to_model_space(views)
    timesteps = draw_timesteps(len(clean), (0.02, 0.98), len(score.alphas_cumprod))
    noise = torch.randn(clean.shape)
    with torch.no_grad():
        abar = score.alphas_cumprod[timesteps][:, None, None, None]
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        predicted = score.predict_noise(noisy, timesteps, prompt, cameras)
        guided = guided_noise(predicted, config.guidance_scale, config.guidance_form)
        gradient = WEIGHTINGS[config.weighting](abar) * (guided - noise)
        gradient = clip_gradient(gradient, config.clip_value, config.clip_norm)
        target = clean - gradient
    return 0.5 * (clean - target).square().sum() / len(clean)


@pytest.mark.parametrize("size", [12, 16])
def test_loss_and_gradient_have_the_bits_of_autograd(loaded: Loaded, size: int) -> None:
    """At a batch of 3, whose share is no power of two, and from there on into a scene."""
    score, asked = loaded
    guidance = ScoreDistillation(score, SdsConfig(guidance_scale=20.0, clip_norm=30.0))
    prompt, cameras = guidance.encode(asked), cameras_of(3)
    found = []
    for loss_of in (through_autograd, ScoreDistillation.__call__):
        scene = pictures(3, size).requires_grad_()
        torch.manual_seed(7)
        loss = loss_of(guidance, scene.sigmoid(), prompt, cameras)
        loss.backward()
        assert scene.grad is not None
        found.append((loss.detach(), scene.grad, torch.get_rng_state()))
    for before, now in zip(*found, strict=True):
        assert torch.equal(before, now)
    assert found[0][1].abs().max() > 0


def test_a_weight_scales_the_gradient_and_not_the_value() -> None:
    guidance = ScoreDistillation(ExactScore(RenderedSubjects(SUBJECTS, 16)))
    prompt, cameras, found = guidance.encode("a red cube"), cameras_of(2), []
    for weight in (1.0, 0.1):
        views = pictures(2, 16).requires_grad_()
        torch.manual_seed(7)
        loss = guidance(views, prompt, cameras)
        (weight * loss).backward()
        found.append((loss.detach(), views.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], 0.1 * found[0][1])


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    views = pictures(1, 4).requires_grad_()
    loss = with_gradient(views, torch.full_like(views, torch.inf), torch.tensor(3.0))
    assert loss.item() == 3
    loss.backward()
    assert views.grad is not None
    assert views.grad.isinf().all()


# -- rows -------------------------------------------------------------------------------------------------------


def rows_of(given: Any, rows: slice) -> Any:
    """Some rows of an argument of a joined call."""
    return tuple(each[rows] for each in given) if isinstance(given, tuple) else given[rows]


def check_rows(call: Callable[..., Any], given: tuple[Any, ...], shared: dict[str, Any]) -> None:
    """All rows at once, against one by one and in another split; what is drawn is drawn before."""
    before, call = torch.get_rng_state(), batched(call)
    whole = call(*given, **shared)
    assert torch.equal(before, torch.get_rng_state())
    whole = whole if isinstance(whole, tuple) else (whole,)
    count = len(given[0])
    for size in (1, 2):
        parts = [slice(at, at + size) for at in range(0, count, size)]
        split = [call(*(rows_of(each, rows) for each in given), **shared) for rows in parts]
        for index, together in enumerate(whole):
            apart = torch.cat([each[index] if isinstance(each, tuple) else each for each in split])
            scale = together.abs().max().item()
            torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-5 * scale)
            assert scale > 0
            assert not torch.equal(together[:1], together[1:2])


def test_a_views_gradient_depends_on_no_other_view(loaded: Loaded) -> None:
    score, asked = loaded
    assert isinstance(score, JoinableScore)
    views, cameras, prompt = pictures(5, 16), cameras_of(5), score.encode(asked)
    drawn = draw_for(score, views)
    timesteps = torch.tensor([20, 300, 500, 700, 980])
    noise, share = torch.randn(5, *score.space), torch.tensor([1.0, 0.5, 0.5, 0.25, 1.0])
    config = SdsConfig(guidance_scale=5.0, clip_norm=20.0, clip_value=2.0)
    given = (views, drawn, timesteps, noise, share, cameras)
    for at_once in (5, 3, 1):
        shared = {"score": score, "prompt": prompt, "config": config, "at_once": at_once}
        check_rows(gradient_of_views, given, shared)


def test_a_refined_view_depends_on_no_other_view(loaded: Loaded) -> None:
    """Views of different steps have different numbers of denoising steps."""
    score, asked = loaded
    assert isinstance(score, JoinableScore)
    denoising = Denoising(score, DenoiseConfig(guidance_scale=3.0, steps=10))
    views, counts = pictures(4, 12), torch.tensor([2, 1, 4, 2])
    noise = torch.randn(4, *score.space)
    given = (views, draw_for(score, views), noise, counts, cameras_of(4))
    for at_once in (4, 3):
        shared = {"denoising": denoising, "prompt": denoising.encode(asked), "at_once": at_once}
        check_rows(refined_views, given, shared)


@pytest.mark.parametrize("networks", [1, 2])
def test_the_pretrained_noise_of_vsd_depends_on_no_other_view(
    folders: dict[str, Path], networks: int
) -> None:
    one, two = (
        StableDiffusion.from_pretrained(folders[name], options=IN_MEMORY)
        for name in ("epsilon", "velocity")
    )
    vsd = VSD(one, VsdConfig(guidance_scale=5.0), None if networks == 1 else two)
    given = (torch.randn(5, *one.space), torch.tensor([5, 99, 500, 700, 980]), cameras_of(5))
    for at_once in (5, 2):
        shared = {"vsd": vsd, "prompt": vsd.encode(PUSHED), "at_once": at_once}
        check_rows(pretrained_noise, given, shared)


# -- what is drawn before ---------------------------------------------------------------------------------------


def test_numbers_drawn_before_are_those_drawn_on_the_way(loaded: Loaded) -> None:
    score, _ = loaded
    assert isinstance(score, JoinableScore)
    views, found = pictures(3, 12), []
    for before in (False, True):
        torch.manual_seed(9)
        drawn = draw_for(score, views) if before else ()
        with torch.no_grad():
            found.append((score.to_model_space(views, *drawn), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0].shape == (3, *score.space)
