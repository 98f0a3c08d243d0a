"""Stable Diffusion and DeepFloyd against diffusers itself, on small random pipelines of the same classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, StableDiffusionPipeline
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.guidance import ScoreDistillation, ScoreModel, SdsConfig
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.diffusion import TextDiffusion, as_noise
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.pixel_diffusion import SHIPPED, PixelDiffusion
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.text_to_view import TextToViewPipeline
from picardopt_3d.guidance.zero123 import Zero123
from picardopt_3d.prompts import PerpNeg, TextPrompt, ViewWords
from torch import Tensor
from torch.nn import functional

from tests.integrations.helpers.tiny_pipelines import save_deepfloyd, save_stable_diffusion

IN_MEMORY = ModelOptions(embeddings=None)
PROMPT = TextPrompt("a Red cube", negative="ugly", views=ViewWords())
SIDES = ["front", "side", "back", "side"]
CAMERAS = turntable_cameras(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {
        "epsilon": save_stable_diffusion(root / "epsilon"),
        "v_prediction": save_stable_diffusion(root / "velocity", "v_prediction"),
        "deepfloyd": save_deepfloyd(root / "deepfloyd"),
    }


def draws(shape: tuple[int, ...], latent: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """What a step draws, in its order: the latent's noise, the noise levels, the noise."""
    torch.manual_seed(11)
    of_latent = torch.randn(latent) if latent else torch.empty(0)
    return of_latent, torch.randint(20, 981, (shape[0],)), torch.randn(shape)


def distilled(score: ScoreModel, config: SdsConfig) -> tuple[Tensor, float]:
    """The gradient that the guidance gives to views, and its loss."""
    guidance = ScoreDistillation(score, config)
    torch.manual_seed(5)
    views = torch.rand(4, 3, 12, 20, requires_grad=True)
    told = guidance.encode(PROMPT)
    torch.manual_seed(11)
    loss = guidance(views, told, CAMERAS)
    loss.backward()
    assert views.grad is not None
    return views.grad, loss.item()


def resized(size: int) -> Tensor:
    torch.manual_seed(5)
    views = torch.rand(4, 3, 12, 20, requires_grad=True)
    pixels = functional.interpolate(
        2 * views - 1, (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    pixels.views = views  # type: ignore[attr-defined]
    return pixels


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusions_gradient_is_a_direct_implementations(
    folders: dict[str, Path], prediction: str
) -> None:
    score = StableDiffusion.from_pretrained(folders[prediction], options=IN_MEMORY)
    assert isinstance(score, ScoreModel)
    gradient, loss = distilled(score, SdsConfig(guidance_scale=100.0))

    pipeline = StableDiffusionPipeline.from_pretrained(
        folders[prediction], safety_checker=None, low_cpu_mem_usage=False
    )
    pixels = resized(16)
    of_latent, timesteps, noise = draws((4, 4, 8, 8), (4, 4, 8, 8))
    posterior = pipeline.vae.encode(pixels).latent_dist
    latents = (posterior.mean + posterior.std * of_latent) * 0.18215
    with torch.no_grad():
        texts = [f"a Red cube, {side} view" for side in SIDES]
        told = pipeline.encode_prompt(texts, "cpu", 1, True, negative_prompt=["ugly"] * 4)
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        conditional, unconditional = (pipeline.unet(noisy, timesteps, e).sample for e in told)
        predicted = unconditional + 100 * (conditional - unconditional)
        abar = pipeline.scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
        if prediction == "v_prediction":
            predicted = abar.sqrt() * predicted + (1 - abar).sqrt() * noisy
        direct = (1 - abar) * (predicted - noise)
    latents.backward(direct / 4)
    torch.testing.assert_close(gradient, pixels.views.grad, atol=1e-4, rtol=1e-3)  # type: ignore[attr-defined]
    assert loss == pytest.approx(direct.square().sum().item() / 8, rel=1e-3)
    for part in (score.unet, score.vae):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())


def test_deepfloyds_gradient_is_a_direct_implementations(folders: dict[str, Path]) -> None:
    score = DeepFloyd.from_pretrained(folders["deepfloyd"], options=IN_MEMORY)
    assert isinstance(score, ScoreModel)
    gradient, loss = distilled(score, SdsConfig(guidance_scale=20.0, guidance_form="cond"))

    pipeline = IFPipeline.from_pretrained(
        folders["deepfloyd"],
        safety_checker=None,
        watermarker=None,
        requires_safety_checker=False,
        low_cpu_mem_usage=False,
    )
    pixels = resized(16)
    _, timesteps, noise = draws((4, 3, 16, 16))
    with torch.no_grad():
        texts = [f"a Red cube, {side} view" for side in SIDES]
        told = pipeline.encode_prompt(texts, device="cpu", negative_prompt=["ugly"] * 4)
        noisy = pipeline.scheduler.add_noise(pixels, noise, timesteps)
        raw = [pipeline.unet(noisy, timesteps, e).sample for e in told]
        assert raw[0].shape[1] == 6  # the noise, then the variance
        conditional, unconditional = (out.split(3, dim=1)[0] for out in raw)
        predicted = conditional + 20 * (conditional - unconditional)
        abar = pipeline.scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
        direct = (1 - abar) * (predicted - noise)
    pixels.backward(direct / 4)
    torch.testing.assert_close(gradient, pixels.views.grad, atol=1e-4, rtol=1e-3)  # type: ignore[attr-defined]
    assert loss == pytest.approx(direct.square().sum().item() / 8, rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in score.unet.parameters())


def test_pixel_diffusions_gradient_is_a_direct_implementations() -> None:
    """The shipped model, which predicts the velocity and is told the camera with and without the prompt."""
    score = PixelDiffusion.from_pretrained()
    gradient, loss = distilled(score, SdsConfig(guidance_scale=3.0, weighting="uniform"))

    pipeline = TextToViewPipeline.from_pretrained(
        SHIPPED, dtype=torch.float32, low_cpu_mem_usage=False
    )
    size = pipeline.unet.config.sample_size
    pixels = resized(size)
    _, timesteps, noise = draws((4, 3, size, size))
    with torch.no_grad():
        told = [
            pipeline.encode([f"a Red cube, {s} view" for s in SIDES]),
            pipeline.encode(["ugly"] * 4),
        ]
        noisy = pipeline.scheduler.add_noise(pixels, noise, timesteps)
        conditional, unconditional = (
            pipeline.unet(noisy, timesteps, e, class_labels=CAMERAS.condition()).sample
            for e in told
        )
        velocity = unconditional + 3 * (conditional - unconditional)
        abar = pipeline.scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
        direct = abar.sqrt() * velocity + (1 - abar).sqrt() * noisy - noise
    pixels.backward(direct / 4)
    torch.testing.assert_close(gradient, pixels.views.grad, atol=1e-4, rtol=1e-3)  # type: ignore[attr-defined]
    assert loss == pytest.approx(direct.square().sum().item() / 8, rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in pipeline_parameters(score))


def pipeline_parameters(score: PixelDiffusion) -> list[torch.nn.Parameter]:
    return [*score.unet.parameters(), *score.pipeline.text_encoder.parameters()]


def test_perp_neg_asks_for_each_negative_at_each_view(folders: dict[str, Path]) -> None:
    """One pass of four times the batch gives what a pass a view and text gives."""
    score = DeepFloyd.from_pretrained(folders["deepfloyd"], options=IN_MEMORY)
    prompt = TextPrompt("a red cube", views=ViewWords(), perp_neg=PerpNeg())
    cameras = orbit_cameras(torch.tensor([0.0, 10.0, 70.0]), torch.tensor([20.0, 150.0, 0.0]))
    noisy, timesteps = torch.randn(3, 3, 16, 16), torch.tensor([50, 500, 900])
    told = score.encode(prompt).at(cameras)
    predicted = score.predict_noise(noisy, timesteps, score.encode(prompt), cameras)
    assert predicted.negatives is not None
    assert predicted.negatives.shape == (2, 3, 3, 16, 16)
    assert torch.equal(predicted.weights, told.weights)
    rows = [told.conditional, told.unconditional, *told.negatives]
    for asked, answers in zip(rows, [*predicted[:2], *predicted.negatives], strict=True):
        for view in range(3):
            one = slice(view, view + 1)
            with torch.no_grad():
                alone = score.unet(noisy[one], timesteps[one], asked[one]).sample[:, :3]
            torch.testing.assert_close(answers[one], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_mean_what_diffusers_schedulers_mean(prediction: str) -> None:
    """From the true answer follows the true noise; from any answer, the scheduler's own guess of the clean view."""
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False
    )
    clean, noise, answer = (torch.randn(5, 4, 8, 8) for _ in range(3))
    timesteps = torch.tensor([0, 100, 500, 900, 999])
    abar = scheduler.alphas_cumprod[timesteps].view(5, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    truth = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
        "sample": clean,
    }
    # At the first noise level nearly all is view; what "sample" says of the noise is a small difference there.
    implied = as_noise(truth[prediction], noisy, abar, prediction)
    torch.testing.assert_close(implied[1:], noise[1:], atol=1e-4, rtol=1e-3)
    implied = as_noise(answer, noisy, abar, prediction)
    for view, timestep in enumerate(timesteps):
        one = slice(view, view + 1)
        guess = scheduler.step(answer[one], timestep, noisy[one]).pred_original_sample
        mine = (noisy[one] - (1 - abar[one]).sqrt() * implied[one]) / abar[one].sqrt()
        torch.testing.assert_close(mine, guess, atol=1e-3, rtol=1e-3)


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        as_noise(torch.rand(1), torch.rand(1), torch.rand(1), "flow")


def same_as_plain(score: TextDiffusion, plain: TextDiffusion, tolerance: float) -> None:
    config = SdsConfig(guidance_scale=3.0)
    for mine, theirs in zip(distilled(score, config), distilled(plain, config), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (ModelOptions(embeddings=None, offload="model"), 0.0),
        (ModelOptions(embeddings=None, offload="sequential"), 0.0),
        (ModelOptions(embeddings=None, channels_last=False), 1e-3),
        (ModelOptions(embeddings=None, attention_slicing=True, vae_slicing=True), 1e-3),
        (ModelOptions(embeddings=None, dtype="bfloat16"), 0.1),
    ],
)
def test_options_change_the_memory_and_not_the_gradient(
    folders: dict[str, Path], options: ModelOptions, tolerance: float
) -> None:
    plain = StableDiffusion.from_pretrained(folders["epsilon"], options=IN_MEMORY)
    score = StableDiffusion.from_pretrained(folders["epsilon"], options=options)
    assert score.vae.dtype == score.unet.dtype == options.torch_dtype
    assert score.vae.use_slicing is options.vae_slicing
    if (
        options.offload == "sequential"
    ):  # between uses the weights are nowhere but in accelerate's map
        assert all(p.device.type == "meta" for p in score.unet.parameters())
    same_as_plain(score, plain, tolerance)
    assert score.to_model_space(torch.rand(1, 3, 16, 16)).dtype == torch.float32


def encoded(score: StableDiffusion | Zero123) -> tuple[int, Tensor, Tensor]:
    """Bytes that are kept for backward by eight views' way into model space; their latents and gradient."""
    torch.manual_seed(5)
    views, kept = torch.rand(8, 3, score.size, score.size, requires_grad=True), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents = score.to_model_space(views)
    latents.square().sum().backward()
    assert views.grad is not None
    return sum(kept), latents.detach(), views.grad


@pytest.mark.parametrize("loader", [StableDiffusion, Zero123])
def test_vae_slicing_keeps_far_less_for_the_same_gradient(
    folders: dict[str, Path], loader: type[StableDiffusion | Zero123]
) -> None:
    source = {"source": folders["epsilon"]} if loader is StableDiffusion else {}
    plain, sliced = (
        encoded(loader.from_pretrained(**source, options=ModelOptions(vae_slicing=slicing)))
        for slicing in (False, True)
    )
    assert sliced[0] < plain[0] / 8
    for mine, theirs in zip(sliced[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_unet_says_the_same(folders: dict[str, Path]) -> None:
    plain = StableDiffusion.from_pretrained(folders["epsilon"], options=IN_MEMORY)
    options = ModelOptions(embeddings=None, compile=True)
    score = StableDiffusion.from_pretrained(folders["epsilon"], options=options)
    same_as_plain(score, plain, 1e-3)


@pytest.mark.parametrize("loader", [StableDiffusion, DeepFloyd, PixelDiffusion])
def test_full_memory_is_said_with_what_helps(
    folders: dict[str, Path], loader: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error itself cannot be had on a CPU, so the UNet raises it as the allocator would."""
    source = {
        StableDiffusion: {"source": folders["epsilon"]},
        DeepFloyd: {"source": folders["deepfloyd"]},
    }.get(loader, {})
    score = loader.from_pretrained(
        **source, options=ModelOptions(embeddings=None, attention_slicing=True)
    )
    told = score.encode("a red cube")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(score.unet, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 MiB") as caught:
        score.predict_noise(
            torch.rand(1, score.unet.config.in_channels, 8, 8),
            torch.tensor([5]),
            told,
            CAMERAS[:1],
        )
    assert 'dtype="float16"' in str(caught.value)
    assert 'offload="model"' in str(caught.value)
    assert "attention_slicing" not in str(caught.value)
