"""The tables of the latent models: PSNR of reconstructed, denoised and sampled views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from picardopt_3d.cameras import Cameras, random_cameras
from picardopt_3d.guidance.zero123_pipeline import Zero123Pipeline, embed_image, relative_pose
from picardopt_3d.prompts import ViewWords
from picardopt_3d.training.data import WIDE_CAMERAS, tokenize
from picardopt_3d.training.tables import EvaluationConfig, groups, print_table, true_views
from picardopt_3d.training.zero123 import CAMERAS
from picardopt_3d.world import Subject, all_subjects


def psnr(views: Tensor, truth: Tensor) -> float:
    """Returns the PSNR over all pixels of RGB views in [0, 1], dB."""
    return float(-10 * (views.clamp(0, 1) - truth).square().mean().log10())


class Latents:
    """The denoising of a latent model, decoded to pixels.

    Args:
        pipeline: A pipeline with `vae`, `unet` and `scheduler`.
    """

    def __init__(self, pipeline: Any) -> None:
        self.vae, self.unet = pipeline.vae, pipeline.unet
        self.abar: Tensor = pipeline.scheduler.alphas_cumprod
        self.prediction: str = pipeline.scheduler.config.prediction_type
        self.scale: float = pipeline.vae.config.scaling_factor

    def encode(self, views: Tensor) -> Tensor:
        """Returns the scaled latents of RGB views in [0, 1]."""
        latents: Tensor = self.vae.encode(2 * views - 1).latent_dist.mode() * self.scale
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the RGB views in [0, 1] of scaled latents."""
        views: Tensor = (self.vae.decode(latents / self.scale).sample / 2 + 0.5).clamp(0, 1)
        return views

    def denoise(
        self,
        clean: Tensor,
        level: int,
        noise: Tensor,
        attended: Tensor,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Adds noise to latents, removes the predicted noise and decodes the result, `[batch, 3, height, width]`."""
        abar = self.abar[level].to(clean)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        inputs = noisy if beside is None else torch.cat([noisy, beside], dim=1)
        timesteps = torch.full((len(clean),), level, device=clean.device)
        predicted = self.unet(inputs, timesteps, encoder_hidden_states=attended).sample
        if self.prediction == "epsilon":
            return self.decode((noisy - (1 - abar).sqrt() * predicted) / abar.sqrt())
        return self.decode(abar.sqrt() * noisy - (1 - abar).sqrt() * predicted)


def poses_of(cameras: Cameras) -> Tensor:
    """Returns elevation and azimuth (degrees), distance and field of view (degrees), `[batch, 4]`."""
    parts = (cameras.elevation, cameras.azimuth, cameras.distance, cameras.fov)
    return torch.stack(parts, dim=-1)


def print_latent_tables(config: EvaluationConfig) -> None:
    """Prints the PSNR of reconstruction, then of denoising with the right caption, none, and another view's words."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        config.folder, dtype=torch.float32, low_cpu_mem_usage=False
    ).to(config.device)
    for name, subjects in groups(config).items():
        kept, rows = latent_denoising(pipeline, config, subjects)
        print(f"{name} subjects, encoded and decoded: {kept:.1f} dB\n")
        heads = [f"noise level, {name} subjects", "right", "no caption", "other view's words"]
        print_table(heads, rows)


def latent_denoising(
    pipeline: Any, config: EvaluationConfig, subjects: Sequence[Subject]
) -> tuple[float, list[tuple[str, list[float]]]]:
    """Returns the PSNR of reconstructed views, and a row of PSNRs of denoised views for each noise level."""
    torch.manual_seed(config.seed)
    cameras = random_cameras(config.views, WIDE_CAMERAS)
    latents, size = Latents(pipeline), pipeline.vae.config.sample_size
    said = ViewWords()
    directions = said.directions(cameras).tolist()
    views = true_views(subjects, cameras, size).flatten(0, 1).to(config.device)

    def embed(texts: list[str]) -> Tensor:
        tokens = tokenize(pipeline.tokenizer, texts).to(config.device)
        states: Tensor = pipeline.text_encoder(tokens).last_hidden_state
        return states

    texts = {
        "right": [said.texts(s.caption)[way] for s in subjects for way in directions],
        "none": [""] * len(views),
        "wrong": [said.texts(s.caption)[(way + 2) % 4] for s in subjects for way in directions],
    }
    embedded = [embed(text) for text in texts.values()]
    clean, rows = latents.encode(views), []
    for level in config.levels:
        noise = torch.randn(clean.shape).to(config.device)
        rows.append(
            (
                f"{level} ({latents.abar[level].item():.3f})",
                [psnr(latents.denoise(clean, level, noise, text), views) for text in embedded],
            )
        )
    return psnr(latents.decode(clean), views), rows


def print_zero123_tables(config: EvaluationConfig) -> None:
    """Prints the PSNR of denoised views, then of sampled new views."""
    pipeline = Zero123Pipeline.from_pretrained(
        config.folder, dtype=torch.float32, low_cpu_mem_usage=False
    ).to(config.device)
    pipeline.set_progress_bar_config(disable=True)
    subjects = all_subjects()[:: config.every]
    heads = ["noise level", "right", "no image, no pose", "another view's pose"]
    print_table(heads, zero123_denoising(pipeline, config, subjects))
    rows = zero123_sampling(pipeline, config, subjects)
    print_table(["guidance scale", f"new views, {config.sample_steps} steps"], rows)


def _pairs(
    config: EvaluationConfig, subjects: Sequence[Subject], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns references, targets and relative poses of random pairs of views of each subject."""
    torch.manual_seed(config.seed)
    seen, wanted = (random_cameras(config.views, CAMERAS) for _ in range(2))
    wanted = wanted[torch.randperm(config.views)]  # both are stratified by azimuth
    images, views = (
        true_views(subjects, cameras, size).flatten(0, 1).to(config.device)
        for cameras in (seen, wanted)
    )
    poses = relative_pose(poses_of(seen)[:, :3], poses_of(wanted)[:, :3])
    return images, views, poses.repeat(len(subjects), 1).to(config.device)


def zero123_denoising(
    pipeline: Any, config: EvaluationConfig, subjects: Sequence[Subject]
) -> list[tuple[str, list[float]]]:
    """Returns a row of PSNRs of denoised views for each noise level."""
    latents = Latents(pipeline)
    images, views, poses = _pairs(config, subjects, pipeline.vae.config.sample_size)
    embedding = embed_image(pipeline.image_encoder, pipeline.feature_extractor, images)
    right, wrong = (
        pipeline.clip_camera_projection(torch.cat([embedding, pose], dim=-1))[:, None]
        for pose in (poses, poses.roll(config.views // 2, 0))
    )
    beside = pipeline.vae.encode(2 * images - 1).latent_dist.mode()
    given = [(right, beside), (0 * right, 0 * beside), (wrong, beside)]
    clean, rows = latents.encode(views), []
    for level in config.levels:
        noise = torch.randn(clean.shape).to(config.device)
        values = [
            psnr(latents.denoise(clean, level, noise, text, image), views) for text, image in given
        ]
        rows.append((f"{level} ({latents.abar[level].item():.3f})", values))
    return rows


def zero123_sampling(
    pipeline: Any, config: EvaluationConfig, subjects: Sequence[Subject]
) -> list[tuple[str, list[float]]]:
    """Returns the PSNR of sampled views, averaged over the views, for each guidance scale."""
    images, views, poses = _pairs(config, subjects, pipeline.vae.config.sample_size)
    rows = []
    for scale in config.scales:
        sampled = pipeline(
            images,
            poses,
            guidance_scale=scale,
            num_inference_steps=config.sample_steps,
            generator=torch.Generator().manual_seed(config.seed),
        )
        found = [psnr(one, truth) for one, truth in zip(sampled, views, strict=True)]
        rows.append((f"{scale:g}", [sum(found) / len(found)]))
    return rows
