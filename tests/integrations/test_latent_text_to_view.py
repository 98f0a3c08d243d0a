"""The shipped latent model through `StableDiffusion`, whole: text encoder, VAE, UNet, score distillation, an object."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.guidance import ScoreDistillation, ScoreModel, SdsConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.pixel_diffusion import SHIPPED
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.prompts import TextPrompt, ViewWords
from picardopt_3d.scenes import FieldConfig, RadianceField
from picardopt_3d.training.evaluate_clip import ClipJudge
from picardopt_3d.world import BACKGROUND, all_subjects, parse_prompt, render
from picardopt_3d.world.yardstick import psnr_against_truth
from torch import Tensor

from picardopt import ParallelPicardOptimizer, step_rng

FOLDER = SHIPPED.parent / "latent-text-to-view"
CAPTIONS = [subject.caption for subject in all_subjects()]
SIDES = ["front", "side", "back", "side"]
AROUND = turntable_cameras(4)


@pytest.fixture(scope="module")
def score() -> StableDiffusion:
    return StableDiffusion.from_pretrained(FOLDER, options=ModelOptions(embeddings=None))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """The same folder through diffusers alone."""
    loaded = StableDiffusionPipeline.from_pretrained(
        FOLDER, low_cpu_mem_usage=False, dtype=torch.float32
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge(SHIPPED.parent / "clip")


def asked(prompt: str) -> TextPrompt:
    """With the words for the view, which this model was trained on."""
    return TextPrompt(prompt, views=ViewWords())


def true_views(prompt: str) -> Tensor:
    subject = parse_prompt(prompt)
    assert subject is not None
    return render(subject, AROUND, 64, 64)[0]


def rank_of(judge: ClipJudge, views: Tensor, prompt: str) -> tuple[float, int]:
    """CLIP's similarity of views and prompt, and how many of the other captions it likes better."""
    found = judge.similarity(views).mean(0)
    own = found[CAPTIONS.index(prompt)]
    return own.item(), int((found > own).sum())


def test_it_loads_as_a_published_one_does(score: StableDiffusion) -> None:
    assert isinstance(score, ScoreModel)
    assert score.size == 64
    assert score.prediction_type == "v_prediction"
    with torch.no_grad():
        latents = score.to_model_space(torch.cat([true_views(c) for c in CAPTIONS[::21]]))
    assert latents.shape == (16, 4, 16, 16)
    assert 0.8 < latents.std() < 1.2  # what the scaling factor is for


def test_its_gradient_is_a_direct_implementations(
    score: StableDiffusion, pipeline: StableDiffusionPipeline
) -> None:
    views = true_views("a red cube").requires_grad_()
    told = score.encode(asked("a green torus"))
    torch.manual_seed(3)
    loss = ScoreDistillation(score, SdsConfig(guidance_scale=7.5))(views, told, AROUND)
    (gradient,) = torch.autograd.grad(loss, views)

    torch.manual_seed(3)
    of_latent, timesteps = torch.randn(4, 4, 16, 16), torch.randint(20, 981, (4,))
    noise = torch.randn(4, 4, 16, 16)
    posterior = pipeline.vae.encode(2 * views - 1).latent_dist
    latents = (posterior.mean + posterior.std * of_latent) * pipeline.vae.config.scaling_factor
    with torch.no_grad():
        texts = [f"a green torus, {side} view" for side in SIDES]
        both = pipeline.encode_prompt(texts, "cpu", 1, True, negative_prompt=[""] * 4)
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        conditional, unconditional = (pipeline.unet(noisy, timesteps, e).sample for e in both)
        velocity = unconditional + 7.5 * (conditional - unconditional)
        abar = pipeline.scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
        direct = (1 - abar) * (abar.sqrt() * velocity + (1 - abar).sqrt() * noisy - noise)
    (expected,) = torch.autograd.grad(latents, views, direct / 4)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    assert loss.item() == pytest.approx(direct.square().sum().item() / 8, rel=1e-3)
    frozen = [*score.unet.parameters(), *score.vae.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_gradient_goes_back_through_the_vae(score: StableDiffusion) -> None:
    """Against differences of the encoder: along a change of one view, and nowhere into the others."""
    views = torch.cat([true_views("a blue chair")[:1], true_views("a red mug")[:1]])
    weights, change = torch.randn(2, 4, 16, 16), torch.randn(3, 64, 64)

    def along(views: Tensor) -> Tensor:
        torch.manual_seed(0)  # the posterior's draw
        return (score.to_model_space(views) * weights).sum(dim=(1, 2, 3))

    views.requires_grad_()
    (gradient,) = torch.autograd.grad(along(views)[0], views)
    assert not gradient[1].any()
    by = 1e-2
    with torch.no_grad():
        ends = [along(torch.stack([views[0] + sign * by * change, views[1]])) for sign in (1, -1)]
    difference = (ends[0] - ends[1])[0] / (2 * by)
    assert (gradient[0] * change).sum().item() == pytest.approx(difference.item(), rel=2e-2)


def test_the_right_words_explain_true_views_best(score: StableDiffusion) -> None:
    """Without guidance the loss is how wrong the denoised view is; of a held-out pair as well."""
    guidance = ScoreDistillation(score, SdsConfig(guidance_scale=1.0))
    for prompt, other in (("a red cube", "a blue cube"), ("a yellow snowman", "a yellow chair")):
        losses = []
        for words in (prompt, other):
            torch.manual_seed(1)
            told = score.encode(asked(words))
            with torch.no_grad():
                losses.append(guidance(true_views(prompt), told, AROUND, (0.6, 0.98)).item())
        assert losses[0] < 0.8 * losses[1]


def test_diffusers_own_pipeline_draws_what_is_asked(
    pipeline: StableDiffusionPipeline, judge: ClipJudge
) -> None:
    prompts = ["a red cube", "a blue chair", "a yellow snowman"]  # the last was never seen
    drawn = pipeline(
        [f"{prompt}, side view" for prompt in prompts],
        guidance_scale=3.0,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert drawn.shape == (3, 3, 64, 64)
    for view, prompt in zip(drawn, prompts, strict=True):
        assert rank_of(judge, view[None].clamp(0, 1), prompt)[1] == 0


class Fit:
    """A radiance field and its optimizer, by score distillation through the latent model."""

    def __init__(self, score: StableDiffusion, prompt: str, size: int = 32) -> None:
        self.guidance = ScoreDistillation(score, SdsConfig(guidance_scale=7.5))
        self.told, self.size = score.encode(asked(prompt)), size
        self.scene = RadianceField(FieldConfig(background=BACKGROUND))
        self.base = torch.optim.Adam(self.scene.parameters(), lr=0.04, betas=(0.9, 0.99), eps=1e-15)

    def closure(self, step: int) -> Tensor:
        self.base.zero_grad()
        cameras = random_cameras(2)
        views = self.scene.render(cameras, self.size, jitter=True).rgb
        loss = self.guidance(views, self.told, cameras)
        loss.backward()
        return loss

    def sequential(self, steps: int) -> list[Tensor]:
        losses = []
        for step in range(steps):
            with step_rng(0, step):
                losses.append(self.closure(step).detach())
                self.base.step()
        return losses


def optimized(score: StableDiffusion, judge: ClipJudge, prompt: str, steps: int) -> list[float]:
    """PSNR, similarity and the number of captions that fit better, before and after a short optimization."""
    fit, subject = Fit(score, prompt), parse_prompt(prompt)
    assert subject is not None
    figures: list[float] = []

    def measure() -> None:
        with torch.no_grad():
            views = fit.scene.render(AROUND, 64).rgb.clamp(0, 1)
        figures.extend([psnr_against_truth(fit.scene, subject, 32), *rank_of(judge, views, prompt)])

    measure()
    fit.sequential(steps)
    measure()
    return figures


def test_score_distillation_makes_an_object(score: StableDiffusion, judge: ClipJudge) -> None:
    before, unlike, _, after, alike, better = optimized(score, judge, "a red cube", 20)
    assert after > before + 2.5
    assert alike > unlike + 0.3
    assert better <= 2


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["a blue torus", "a yellow snowman"])
def test_score_distillation_makes_the_object(
    score: StableDiffusion, judge: ClipJudge, prompt: str
) -> None:
    """Longer: CLIP prefers the caption to all others; the last pair was held out of training."""
    before, unlike, _, after, alike, better = optimized(score, judge, prompt, 60)
    assert after > before + 3
    assert alike > unlike + 0.3
    assert better == 0


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_picard_iteration_through_it_is_exact(score: StableDiffusion) -> None:
    """The VAE's own draw is the step's randomness too."""
    plain, ahead = Fit(score, "a red cube", 16), Fit(score, "a red cube", 16)
    expected = plain.sequential(4)
    optimizer = ParallelPicardOptimizer(ahead.base, window=3, tolerance=0, seed=0)
    closure: Callable[[int], Tensor] = ahead.closure
    assert same_bits([optimizer.step(closure) for _ in range(4)], expected)
    assert same_bits(list(ahead.scene.parameters()), list(plain.scene.parameters()))
