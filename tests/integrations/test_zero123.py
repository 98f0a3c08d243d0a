from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras, turntable_cameras
from picardopt_3d.guidance.loading import ModelOptions, Precision
from picardopt_3d.guidance.protocol import EncodedImage, ScoreModel
from picardopt_3d.guidance.sds import ScoreDistillation, SdsConfig, guided_noise
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.zero123 import Zero123
from picardopt_3d.guidance.zero123_pipeline import CCProjection, Zero123Pipeline
from picardopt_3d.prompts import ImagePrompt
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.integrations.helpers.tiny_pipelines import (
    WIDTH,
    latent_unet,
    save_stable_diffusion,
    save_zero123,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zero123(tmp_path_factory.mktemp("models") / "zero123")


@pytest.fixture(scope="module")
def picture() -> ImagePrompt:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImagePrompt(image, orbit_cameras(20.0, 30.0, 1.6))


# -- the pose ---------------------------------------------------------------------------------------------


def published_pose(reference: Tensor, target: Tensor) -> list[float]:
    """The pose as Zero-1-to-3's training code makes it of two positions in a world whose z axis is up."""

    def spherical(position: Tensor) -> tuple[float, float, float]:
        x, y, z = position.tolist()
        theta = math.atan2(math.hypot(x, y), z)  # from the pole down
        return theta, math.atan2(y, x), math.sqrt(x * x + y * y + z * z)

    theta, azimuth, distance = spherical(reference)
    theta_target, azimuth_target, distance_target = spherical(target)
    around = (azimuth_target - azimuth) % (2 * math.pi)
    return [theta_target - theta, math.sin(around), math.cos(around), distance_target - distance]


def test_the_pose_is_that_of_the_published_training_code(folder: Path) -> None:
    score, cameras = Zero123.from_pretrained(folder), random_cameras(16)
    reference = orbit_cameras(-5.0, 170.0, 1.75)
    expected = [published_pose(reference.position[0], at) for at in cameras.position]
    found = score.relative_pose(reference, cameras)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    higher = score.relative_pose(reference, orbit_cameras(30.0, 170.0, 1.75))
    torch.testing.assert_close(higher, torch.tensor([[-math.radians(35), 0.0, 1.0, 0.0]]))


def test_stable_zero123_is_told_the_pictures_polar_angle(folder: Path, tmp_path: Path) -> None:
    reference, cameras = orbit_cameras(20.0, 0.0, 1.5), orbit_cameras(0.0, 90.0, 1.8)
    stable = tmp_path / "stable-zero123-diffusers"
    stable.symlink_to(folder)
    assert Zero123.from_pretrained(stable).pose == "polar"
    pose = Zero123.from_pretrained(folder, pose="polar").relative_pose(reference, cameras)
    expected = torch.tensor([[math.radians(20), 1.0, 0.0, math.radians(70)]])
    torch.testing.assert_close(pose, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="pose='radius'"):
        Zero123.from_pretrained(folder, pose="radius")  # type: ignore[arg-type]


# -- the score --------------------------------------------------------------------------------------------


def ask_as_the_pipeline_does(
    score: Zero123, picture: ImagePrompt, cameras: Cameras, noisy: Tensor, timesteps: Tensor
) -> Tensor:
    """What the community's pipeline gives its UNet, and gets: without conditioning first. [2 batch, ...]."""
    parts, batch = score.pipeline, len(cameras)
    image = picture.image[None].repeat(batch, 1, 1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    embedding = parts.image_encoder((image - mean) / deviation).image_embeds[:, None]
    positions = cameras.position
    poses = [published_pose(picture.camera.position[0], position) for position in positions]
    joined = torch.cat([embedding, torch.tensor(poses)[:, None]], dim=-1)
    token = parts.clip_camera_projection(joined)
    assert token.shape == (batch, 1, WIDTH)
    latent = parts.vae.encode(2 * image - 1).latent_dist.mode()  # not scaled
    assert latent.shape == noisy.shape
    given = torch.cat([noisy, noisy])
    given = torch.cat([given, torch.cat([torch.zeros_like(latent), latent])], dim=1)
    told = torch.cat([torch.zeros_like(token), token])
    return parts.unet(given, timesteps.repeat(2), encoder_hidden_states=told).sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_gradient_is_that_of_the_paper(
    picture: ImagePrompt, tmp_path: Path, prediction: str
) -> None:
    score = Zero123.from_pretrained(save_zero123(tmp_path, prediction))
    assert isinstance(score, ScoreModel)
    assert score.size == 16
    guidance = ScoreDistillation(score, SdsConfig(guidance_scale=3.0))
    prompt, cameras = guidance.encode(picture), random_cameras(3)
    views = torch.rand(3, 3, 16, 16, requires_grad=True)
    torch.manual_seed(2)
    guidance(views, prompt, cameras, (0.2, 0.8)).backward()

    again = views.detach().requires_grad_()
    torch.manual_seed(2)
    posterior = score.vae.encode(2 * again - 1).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    latents = latents * score.vae.config.scaling_factor
    t, noise = torch.randint(200, 801, (3,)), torch.randn(latents.shape)
    with torch.no_grad():
        noisy = score.pipeline.scheduler.add_noise(latents, noise, t)
        without, having = ask_as_the_pipeline_does(score, picture, cameras, noisy, t).chunk(2)
        guided = without + 3.0 * (having - without)
        abar = score.pipeline.scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
        if prediction == "v_prediction":
            guided = abar.sqrt() * guided + (1 - abar).sqrt() * noisy
        gradient = (1 - abar) * (guided - noise) / 3
    (latents * gradient).sum().backward()
    torch.testing.assert_close(views.grad, again.grad, rtol=1e-3, atol=1e-6)
    frozen = [p for part in ("unet", "vae") for p in getattr(score, part).parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_views_and_pictures_of_other_sizes_are_resized(folder: Path) -> None:
    guidance = ScoreDistillation(Zero123.from_pretrained(folder))
    image = torch.rand(3, 40, 24)
    prompt = guidance.encode(ImagePrompt(image, orbit_cameras(0.0, 0.0)))
    assert isinstance(prompt, EncodedImage)
    assert prompt.latent.shape == (1, 4, 8, 8)
    views = torch.rand(2, 3, 24, 20, requires_grad=True)
    guidance(views, prompt, turntable_cameras(2)).backward()
    assert views.grad is not None
    assert views.grad.shape == views.shape
    assert views.grad.abs().sum() > 0


def test_half_precision(folder: Path, picture: ImagePrompt) -> None:
    score = Zero123.from_pretrained(folder, options=ModelOptions(dtype="bfloat16"))
    whole = Zero123.from_pretrained(folder)
    noisy, t, cameras = torch.randn(2, 4, 8, 8), torch.tensor([100, 600]), turntable_cameras(2)
    near, exact = (
        one.predict_noise(noisy, t, one.encode(picture), cameras) for one in (score, whole)
    )
    assert near.conditional.dtype is torch.float32
    torch.testing.assert_close(near.conditional, exact.conditional, atol=0.1, rtol=0.1)
    assert score.to_model_space(torch.rand(1, 3, 16, 16)).dtype is torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_shipped_model_in_half_precision(dtype: Precision) -> None:
    """Its pictures are larger than its image encoder's, so that they are resized."""
    half, whole = (
        Zero123.from_pretrained(options=ModelOptions(dtype=d)) for d in (dtype, "float32")
    )
    torch.manual_seed(0)
    image = torch.rand(3, 6, 6).repeat_interleave(16, 1).repeat_interleave(16, 2)
    told = ImagePrompt(image, orbit_cameras(20.0, 30.0, 1.6))
    near, exact = half.encode(told), whole.encode(told)
    assert near.embedding.dtype is torch.float32
    for name in ("embedding", "latent"):
        mine, theirs = getattr(near, name), getattr(exact, name)
        assert (mine - theirs).norm() < 0.05 * theirs.norm()
    half.pipeline.set_progress_bar_config(disable=True)
    views = half.sample(told, turntable_cameras(2), steps=2)
    assert views.isfinite().all()


def test_sampling_is_the_schedulers_loop_over_the_same_score(
    folder: Path, picture: ImagePrompt
) -> None:
    score, cameras = Zero123.from_pretrained(folder), turntable_cameras(2)
    score.pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    views = score.sample(picture, cameras, guidance_scale=2.0, steps=4, generator=generator)
    assert views.shape == (2, 3, 16, 16)
    assert 0 <= views.min() < views.max() <= 1

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt, scheduler = score.encode(picture), score.pipeline.scheduler
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            predicted = score.predict_noise(latents, t.repeat(2), prompt, cameras)
            latents = scheduler.step(guided_noise(predicted, 2.0), t, latents).prev_sample
        decoded = score.vae.decode(latents / score.vae.config.scaling_factor).sample
    torch.testing.assert_close(views, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-3)


# -- layouts ----------------------------------------------------------------------------------------------


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_published_layout_with_code_of_its_own(
    folder: Path, picture: ImagePrompt, tmp_path: Path
) -> None:
    """ashawkey's: classes in a module beside the weights, which is not run."""
    save_zero123(tmp_path)
    module = "raise RuntimeError('was run')"
    (tmp_path / "clip_camera_projection" / "zero123.py").write_text(module)
    rewrite(
        tmp_path / "model_index.json",
        clip_camera_projection=["zero123", "CLIPCameraProjection"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        _class_name="Zero123Pipeline",
    )
    assert_same_score(Zero123.from_pretrained(tmp_path), Zero123.from_pretrained(folder), picture)


def test_the_layout_of_diffusers_community_pipeline(picture: ImagePrompt, tmp_path: Path) -> None:
    """kxic's: the linear layer under another name, its sizes (CLIP-L's) nowhere written."""
    expected = Zero123.from_pretrained(save_zero123(tmp_path, width=768))
    old, new = tmp_path / "clip_camera_projection", tmp_path / "cc_projection"
    old.rename(new)
    rewrite(
        new / "config.json",
        _class_name="CCProjection",
        embedding_dim=None,
        additional_embeddings=None,
    )
    weights = new / "diffusion_pytorch_model.safetensors"
    renamed = {k.replace("proj.", "projection."): v for k, v in load_file(weights).items()}
    weights.unlink()  # the tensors of `expected` may lie in it
    save_file(renamed, weights, metadata={"format": "pt"})
    rewrite(
        tmp_path / "model_index.json",
        clip_camera_projection=None,
        cc_projection=["pipeline_zero1to3", "CCProjection"],
        _class_name="Zero1to3StableDiffusionPipeline",
    )
    found = Zero123.from_pretrained(tmp_path)
    assert isinstance(found.pipeline.clip_camera_projection, CCProjection)
    assert_same_score(found, expected, picture)


@pytest.mark.slow
def test_a_hub_id_is_loaded_from_the_cache(tmp_path: Path) -> None:
    """In a process of its own, without a network: only the cache can answer."""
    source = "ashawkey/stable-zero123-diffusers"
    model = tmp_path / "hub" / f"models--{source.replace('/', '--')}"
    save_zero123(model / "snapshots" / ("1" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1" * 40)
    script = (
        "from picardopt_3d.guidance.zero123 import Zero123\n"
        f"print(Zero123.from_pretrained({source!r}).pose)\n"
        "try: Zero123.from_pretrained('kxic/zero123-xl')\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    pose, refused = done.stdout.splitlines()[:2]
    assert pose == "polar"
    assert "hf download kxic/zero123-xl" in refused


def assert_same_score(score: Zero123, other: Zero123, picture: ImagePrompt) -> None:
    noisy, t, cameras = torch.randn(2, 4, 8, 8), torch.tensor([100, 600]), turntable_cameras(2)
    first, second = (
        one.predict_noise(noisy, t, one.encode(picture), cameras) for one in (score, other)
    )
    assert torch.equal(first.conditional, second.conditional)
    assert torch.equal(first.unconditional, second.unconditional)
    assert not torch.equal(first.conditional, first.unconditional)


def test_what_cannot_be_used_is_said(folder: Path, picture: ImagePrompt, tmp_path: Path) -> None:
    score = Zero123.from_pretrained(folder)
    with pytest.raises(TypeError, match=r"str: Zero123 takes a picture"):
        score.encode("a red mug")
    text = StableDiffusion.from_pretrained(
        save_stable_diffusion(tmp_path / "text"), options=ModelOptions(embeddings=None)
    ).encode("a red mug")
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    with pytest.raises(TypeError, match="own `encode`"):
        score.predict_noise(noisy, t, text, turntable_cameras(1))
    with pytest.raises(ValueError, match="load it with StableDiffusion"):
        Zero123.from_pretrained(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Zero123.from_pretrained(tmp_path / "nothing")
    rewrite(save_zero123(tmp_path / "cut") / "model_index.json", clip_camera_projection=None)
    with pytest.raises(ValueError, match="no projection of the camera"):
        Zero123.from_pretrained(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="could not be loaded"):
        (save_zero123(tmp_path / "lost") / "image_encoder" / "model.safetensors").unlink()
        Zero123.from_pretrained(tmp_path / "lost")
    parts = dict(score.pipeline.components)
    with pytest.raises(ValueError, match=r"takes 4 channels.*StableDiffusion"):
        Zero123(Zero123Pipeline(**{**parts, "unet": latent_unet()}))
