"""Variational score distillation on random models, and its gradients written out with diffusers' own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from picardopt_3d.cameras import random_cameras
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.protocol import Guidance
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.vsd import VSD
from picardopt_3d.prompts import TextPrompt, ViewWords
from torch import Tensor
from torch.nn.functional import mse_loss


def load(folder: Path, **options: Any) -> StableDiffusion:
    return StableDiffusion.from_pretrained(folder, options=ModelOptions(embeddings=None, **options))


def stir(vsd: VSD) -> VSD:
    """A LoRA that has learnt something: its second half starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for parameter in vsd.lora_parameters:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vsd


def check_against_the_source(vsd: VSD, folder: Path, lora_folder: Path) -> None:
    """Equation 9 and the LoRA's loss written out with diffusers' own pipeline, schedulers and loss."""
    assert isinstance(vsd, Guidance)
    config, cameras = vsd.config, random_cameras(3)
    prompt = vsd.encode(TextPrompt("a red mug", "blurred", views=ViewWords()))
    views = torch.rand(3, 3, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    vsd(views, prompt, cameras, (0.1, 0.6)).backward()
    learnt = [p.grad.clone() for p in vsd.lora_parameters if p.grad is not None]

    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    lora_scheduler = DDPMScheduler.from_pretrained(lora_folder, subfolder="scheduler")
    lora_pipeline = StableDiffusionPipeline.from_pretrained(lora_folder, low_cpu_mem_usage=False)

    def embed(pipe: StableDiffusionPipeline, texts: list[str]) -> Tensor:
        return pipe.encode_prompt(texts, "cpu", 1, False)[0].detach()

    words = ViewWords().directions(cameras).tolist()
    viewed = embed(pipeline, [ViewWords().texts("a red mug")[i] for i in words])
    blurred = embed(pipeline, ["blurred"] * 3)
    plain, lora_blurred = (embed(lora_pipeline, [t] * 3) for t in ("a red mug", "blurred"))
    pose = cameras.camera_to_world.reshape(3, 16)
    unet, lora_unet = pipeline.unet, vsd.lora_score.unet  # one without, one with the LoRA

    again = views.detach().requires_grad_()
    torch.manual_seed(3)
    posterior = pipeline.vae.encode(2 * again - 1).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    latents = latents * pipeline.vae.config.scaling_factor
    t, noise = torch.randint(100, 601, (3,)), torch.randn(latents.shape)
    lora_t, lora_noise = torch.randint(0, 1000, (3,)), torch.randn(latents.shape)
    with torch.no_grad():
        noisy = scheduler.add_noise(latents, noise, t)
        without = unet(noisy, t, blurred).sample
        wanted = without + config.guidance_scale * (unet(noisy, t, viewed).sample - without)
        present = lora_unet(noisy, t, plain, class_labels=pose).sample
        if config.lora_guidance_scale != 1:
            none = lora_unet(noisy, t, lora_blurred, class_labels=0 * pose).sample
            present = none + config.lora_guidance_scale * (present - none)
        abar = scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
        if lora_scheduler.config.prediction_type == "v_prediction":
            present = noisy * (1 - abar).sqrt() + present * abar.sqrt()
        weight = 1 - abar if config.weighting == "sds" else 1.0
        gradient = weight * (wanted - present)
    target = (latents - gradient).detach()
    (0.5 * mse_loss(latents, target, reduction="sum") / 3).backward()
    torch.testing.assert_close(views.grad, again.grad, rtol=1e-3, atol=1e-6)

    noisy = lora_scheduler.add_noise(latents.detach(), lora_noise, lora_t)
    heard = pose * (1 - config.drop_camera)
    predicted = lora_unet(noisy, lora_t, plain, class_labels=heard).sample
    kind = lora_scheduler.config.prediction_type
    target = lora_noise
    if kind == "v_prediction":
        target = lora_scheduler.get_velocity(latents.detach(), lora_noise, lora_t)
    expected = torch.autograd.grad(mse_loss(predicted, target), vsd.lora_parameters)
    for mine, its in zip(learnt, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-3, atol=1e-6)
