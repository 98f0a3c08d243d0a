"""Image-to-image denoising: against diffusers' own pipeline, and with the closed-form score of known views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.guidance import (
    DenoiseConfig,
    ExactScore,
    KnownViews,
    RenderedSubjects,
    ScoreModel,
    SdsConfig,
    TimestepSchedule,
)
from picardopt_3d.guidance.choose import (
    GuidanceConfig,
    Loss,
    check_denoising,
    load_guidance,
    load_score,
)
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.denoise import Denoising, ddim_scheduler
from picardopt_3d.guidance.exact_score import cosine_schedule
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.zero123 import Zero123
from picardopt_3d.methods.zero123 import SMALL as ZERO123
from picardopt_3d.prompts import ImagePrompt
from picardopt_3d.world import Subject, true_views
from torch import Tensor
from torch.nn import functional

from tests.integrations.helpers.tiny_pipelines import (
    save_deepfloyd,
    save_stable_diffusion,
    save_zero123,
)

IN_MEMORY = ModelOptions(embeddings=None)
CAMERAS = turntable_cameras(3)
DREAMGAUSSIAN = TimestepSchedule(low=(0.2, 0.05), high=(0.2, 0.05))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {
        "epsilon": save_stable_diffusion(root / "epsilon"),
        "v_prediction": save_stable_diffusion(root / "velocity", "v_prediction"),
        "deepfloyd": save_deepfloyd(root / "deepfloyd"),
        "zero123": save_zero123(root / "zero123"),
    }


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def picture() -> ImagePrompt:
    return ImagePrompt(pictures(1)[0], orbit_cameras(10.0, 20.0))


def all_models(folders: dict[str, Path]) -> dict[str, tuple[ScoreModel, Any]]:
    """Every kind of score model, with a prompt that it takes."""
    return {
        "stable-diffusion": (
            StableDiffusion.from_pretrained(folders["epsilon"], options=IN_MEMORY),
            "red",
        ),
        "deepfloyd": (DeepFloyd.from_pretrained(folders["deepfloyd"], options=IN_MEMORY), "red"),
        "zero123": (Zero123.from_pretrained(folders["zero123"]), picture()),
        "pixels": (PixelDiffusion.from_pretrained(), "a red cube"),
        "exact": (ExactScore(RenderedSubjects([Subject("cube", "red")], 16)), "a red cube"),
    }


# -- against other implementations ---------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.2, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
# Diffusers 0.30 warns of what its own pipeline does.
@pytest.mark.filterwarnings("ignore:Accessing config attribute .vae_latent:FutureWarning")
def test_views_are_refined_as_by_diffusers_own_pipeline(
    folders: dict[str, Path], prediction: str, strength: float
) -> None:
    """`StableDiffusionImg2ImgPipeline` of the same model with the same noise, at strengths that are our fractions."""
    score = StableDiffusion.from_pretrained(folders[prediction], options=IN_MEMORY)
    denoising = Denoising(score, DenoiseConfig(guidance_scale=5.0, steps=20))
    views = pictures()
    encoded = denoising.encode("a red cube")
    torch.manual_seed(7)
    found = denoising.refine(views, encoded, CAMERAS, (strength, strength))

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        folders[prediction],
        safety_checker=None,
        requires_safety_checker=False,
        low_cpu_mem_usage=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    torch.randint(1, 2, ())  # the number of steps
    expected = pipeline(
        ["a red cube"] * 3,
        image=views,
        strength=strength,
        num_inference_steps=20,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - views).abs().mean() > 0.05


def test_a_pictures_model_refines_as_a_direct_implementation(folders: dict[str, Path]) -> None:
    score = Zero123.from_pretrained(folders["zero123"])
    denoising = Denoising(score, DenoiseConfig(guidance_scale=5.0, steps=10))
    views, prompt = pictures(), denoising.encode(picture())
    torch.manual_seed(7)
    found = denoising.refine(views, prompt, CAMERAS, (0.3, 0.3))

    pipeline = score.pipeline
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    torch.manual_seed(7)
    torch.randint(1, 2, ())
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * views - 1).latent_dist.sample() * 0.18215
        latents = scheduler.add_noise(
            latents, torch.randn(latents.shape), scheduler.timesteps[[7] * 3]
        )
        assert scheduler.timesteps[7:].tolist() == [201, 101, 1]
        token, beside = score.conditions(prompt, CAMERAS)  # type: ignore[arg-type]
        for timestep in scheduler.timesteps[7:]:
            noise = [
                pipeline.unet(
                    torch.cat([latents, on * beside], dim=1),
                    timestep,
                    encoder_hidden_states=on * token,
                ).sample
                for on in (0, 1)
            ]
            guided = noise[0] + 5.0 * (noise[1] - noise[0])
            latents = scheduler.step(guided, timestep, latents).prev_sample
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(found, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


def test_levels_begin_where_dreamgaussians_released_code_begins() -> None:
    """It takes `timesteps[int(50 * strength):]`, with strengths from 0.8 to 0.95 that rise with the step."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(50)
    ours = ddim_scheduler(scheduler.alphas_cumprod, 50)
    assert torch.equal(ours.timesteps, scheduler.timesteps)
    assert torch.equal(ours.alphas_cumprod, scheduler.alphas_cumprod)
    denoising = Denoising(ExactScore(RenderedSubjects([Subject("cube", "red")], 4)))
    for step in range(50):
        count = denoising._draw_count(DREAMGAUSSIAN.at(step, 50))
        assert count == 50 - int(50 * (0.8 + 0.15 * step / 50))
    assert denoising._draw_count(DREAMGAUSSIAN.at(0, 50)) == 10
    assert denoising._draw_count(DREAMGAUSSIAN.at(49, 50)) == 3
    # Steps that do not divide the schedule end below its top, as `refine` says.
    assert int(ddim_scheduler(scheduler.alphas_cumprod, 600).timesteps[0]) == 600


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_refining_on_a_device_changes_no_state() -> None:
    """The optimizer takes a change of what a step reads for a change by the user."""
    denoising = Denoising(ExactScore(RenderedSubjects([Subject("cube", "red")], 16)))
    before = dict(vars(denoising._scheduler))
    cameras, views = CAMERAS.to("cuda"), pictures().cuda()
    torch.manual_seed(0)
    found = denoising.refine(views, denoising.encode("a red cube"), cameras, (0.2, 0.2))
    after = vars(denoising._scheduler)
    assert {name for name in after if after[name] is not before[name]} == set()
    torch.manual_seed(0)
    on_cpu = denoising.refine(views.cpu(), denoising.encode("a red cube"), CAMERAS, (0.2, 0.2))
    torch.testing.assert_close(found.cpu(), on_cpu, rtol=0, atol=1e-4)


def test_the_number_of_steps_is_drawn_from_the_whole_range_and_no_more() -> None:
    denoising = Denoising(ExactScore(RenderedSubjects([Subject("cube", "red")], 4)))
    assert {denoising._draw_count((0.05, 0.2)) for _ in range(200)} == set(range(3, 11))
    assert {denoising._draw_count((0.0, 0.0)), denoising._draw_count((1.0, 1.0))} == {1, 50}


# -- the closed-form score -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["uncond", "cond"])
def test_with_the_closed_form_score_a_view_becomes_the_true_one(form: Any) -> None:
    """Of two objects the prompt's is approached; "cond" with s is "uncond" with s + 1."""
    subjects = [Subject("cube", "red"), Subject("cube", "green")]
    scale = {"uncond": 3.0, "cond": 2.0}[form]
    denoising = Denoising(
        ExactScore(RenderedSubjects(subjects, 16)),
        DenoiseConfig(guidance_scale=scale, guidance_form=form, steps=20),
    )
    true, other = (true_views(subject, CAMERAS, 16) for subject in subjects)
    views = (0.6 * true + 0.4 * other + 0.1 * pictures()).clamp(0, 1)
    prompt = denoising.encode("a red cube")
    torch.manual_seed(0)
    refined = denoising.refine(views, prompt, CAMERAS, (0.4, 0.6))
    assert functional.mse_loss(refined, true) < 0.02 * functional.mse_loss(views, true)

    pixels = torch.nn.Parameter(views.clone())
    optimizer = torch.optim.Adam([pixels], lr=0.1)
    for step in range(40):
        torch.manual_seed(step)
        optimizer.zero_grad()
        denoising(pixels, prompt, CAMERAS, (0.4, 0.6)).backward()
        optimizer.step()
    assert functional.mse_loss(pixels, true) < 0.05 * functional.mse_loss(views, true)


def test_both_forms_of_guidance_are_one_with_scales_that_differ_by_one() -> None:
    """Where the conditional and the unconditional score differ."""
    views = KnownViews(pictures(2, 8), turntable_cameras(2), ["one", "two"], bandwidth=90.0)
    found = []
    for form, scale in (("uncond", 4.0), ("cond", 3.0), ("cond", 4.0)):
        config = DenoiseConfig(guidance_scale=scale, guidance_form=form, steps=4)  # type: ignore[arg-type]
        denoising = Denoising(ExactScore(views), config)
        torch.manual_seed(3)
        found.append(
            denoising.refine(
                pictures(size=8), denoising.encode("one"), turntable_cameras(3), (1.0, 1.0)
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3


# -- what every model keeps ----------------------------------------------------------------------------------


def test_every_models_space_leads_back_to_views(folders: dict[str, Path]) -> None:
    """Pixels exactly, if they have the model's size; latents by the VAE's decoder; clamped and without a gradient."""
    for name, (score, _) in all_models(folders).items():
        assert isinstance(score, ScoreModel)
        views = pictures(2, score.size).requires_grad_()
        space = score.to_model_space(views)
        back = score.to_views(space)
        assert back.shape == views.shape
        assert back.dtype == torch.float32
        assert not back.requires_grad
        if isinstance(score, StableDiffusion | Zero123):
            with torch.no_grad():
                decoded = score.vae.decode(space / score.vae.config.scaling_factor).sample
            torch.testing.assert_close(back, (decoded / 2 + 0.5).clamp(0, 1))
            score.vae.decoder.conv_out.weight.data *= 50
        else:
            torch.testing.assert_close(back, views, msg=name)
        assert score.to_views(50 * space).min() == 0
        assert score.to_views(50 * space).max() == 1


def test_half_precision_decodes_to_float32(folders: dict[str, Path]) -> None:
    options = ModelOptions(dtype="bfloat16", embeddings=None, vae_slicing=True)
    exact, rough = (
        StableDiffusion.from_pretrained(folders["epsilon"], options=each)
        for each in (IN_MEMORY, options)
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert rough.to_views(latents).dtype == torch.float32
    torch.testing.assert_close(rough.to_views(latents), exact.to_views(latents), rtol=0, atol=0.05)


def test_the_gradient_is_that_of_the_difference_and_reaches_only_the_views(
    folders: dict[str, Path],
) -> None:
    """Views of any size; half the views' numbers of the loss is its gradient's scale."""
    for score, asked in all_models(folders).values():
        denoising = Denoising(score, DenoiseConfig(steps=10))
        prompt = denoising.encode(asked)
        views = pictures(3, 12).requires_grad_()
        torch.manual_seed(2)
        loss = denoising(views, prompt, CAMERAS, (0.1, 0.3))
        loss.backward()
        torch.manual_seed(2)
        refined = denoising.refine(views, prompt, CAMERAS, (0.1, 0.3))
        assert refined.shape == views.shape
        assert not refined.requires_grad
        torch.testing.assert_close(loss, (views - refined).square().mean())
        torch.testing.assert_close(views.grad, 2 * (views.detach() - refined) / views.numel())
        network = getattr(score, "unet", None)
        assert network is None or all(each.grad is None for each in network.parameters())


def test_random_numbers_come_only_from_torchs_global_generator(folders: dict[str, Path]) -> None:
    """On the CPU, in the documented order: the number of steps, the latent's noise, the noise."""
    score = StableDiffusion.from_pretrained(folders["epsilon"], options=IN_MEMORY)
    denoising = Denoising(score, DenoiseConfig(steps=10))
    prompt, values = denoising.encode("red"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(denoising(pictures(), prompt, CAMERAS, (0.1, 0.9)).item())
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        torch.randint(1, 9, ())
        torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
        assert torch.equal(after, torch.get_rng_state())
    assert values[0] == values[1] != values[2]


# -- choice and refusals -------------------------------------------------------------------------------------


def test_stages_of_different_losses_share_a_network(folders: dict[str, Path]) -> None:
    def loaded(loss: Loss, **options: Any) -> Any:
        config = GuidanceConfig("zero123", str(folders["zero123"]), loss=loss)
        return load_guidance(config, picture(), 16, "cpu", **options)

    first = loaded("sds", sds=SdsConfig(guidance_scale=2.0))
    second = loaded("denoise", denoise=DenoiseConfig(guidance_scale=9.0, steps=7))
    assert isinstance(second, Denoising)
    assert second.score is first.score
    assert (second.config.guidance_scale, second.config.steps) == (9.0, 7)
    assert second.state_dict() == {}


def test_every_model_may_denoise() -> None:
    for model in ("pixel-diffusion", "zero123", "exact"):
        GuidanceConfig(model, loss="denoise")
    assert load_guidance(GuidanceConfig("exact", loss="denoise"), "a red cube", 8, "cpu").size == 8
    assert ZERO123.denoise == DenoiseConfig()


def test_noise_levels_are_known_before_a_model_is_loaded(folders: dict[str, Path]) -> None:
    given = [
        *(("stable-diffusion", folders[name]) for name in ("epsilon", "v_prediction")),
        ("deepfloyd", folders["deepfloyd"]),
        ("zero123", folders["zero123"]),
        *((name, None) for name in ("pixel-diffusion", "stable-diffusion", "zero123", "exact")),
    ]
    for model, source in given:
        config = GuidanceConfig(model, source and str(source), IN_MEMORY, loss="denoise")
        prompt = picture() if model == "zero123" else "a red cube"
        levels = len(load_score(config, prompt, 16, "cpu").alphas_cumprod)
        check_denoising(config, DenoiseConfig(steps=levels))
        with pytest.raises(ValueError, match=f"the model has {levels} noise levels"):
            check_denoising(config, DenoiseConfig(steps=levels + 1))
        check_denoising(replace(config, loss="sds"), DenoiseConfig(steps=levels + 1))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="steps=0: give a whole number of at least 1"):
        DenoiseConfig(steps=0)
    with pytest.raises(ValueError, match="guidance_form='both': give one of uncond, cond"):
        DenoiseConfig(guidance_form="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss='ssd': give one of sds, vsd, denoise"):
        GuidanceConfig(loss="ssd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"denoise\.steps=101: the model has 100 noise levels"):
        ddim_scheduler(cosine_schedule(100), 101)
    for steps in (1, 37, 60, 99, 100):
        assert ddim_scheduler(cosine_schedule(100), steps).timesteps.max() < 100
    denoising = Denoising(ExactScore(RenderedSubjects([Subject("cube", "red")], 8)))
    prompt, fewer = denoising.encode(""), CAMERAS[:2]
    with pytest.raises(ValueError, match=r"timestep_range=.*low <= high"):
        denoising(pictures(), prompt, CAMERAS, (0.3, 0.2))
    with pytest.raises(ValueError, match="for 2 cameras"):
        denoising(pictures(), prompt, fewer)
