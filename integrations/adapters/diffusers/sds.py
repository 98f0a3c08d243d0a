"""Score distillation with a stock StableDiffusionPipeline: a picture, optimized until the model finds it likely.

SDS (arXiv 2209.14988) in a plain script: nothing of picardopt-3d, no renderer but the picture itself. Put your scene's
renderer in the place of `picture`. FOLDER is a model of the hub, or a folder of one:

    python integrations/adapters/diffusers/sds.py FOLDER --prompt "a red thing" --steps 40
    torchrun --nproc-per-node 2 integrations/adapters/diffusers/sds.py FOLDER --window 2
"""

from __future__ import annotations

import argparse
import os

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

import picardopt


def main() -> None:
    """Optimizes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompt", default="a red thing")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "RANK" in os.environ:
        picardopt.init_process_group()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(options.model).to(device)
    vae, unet = pipeline.vae.requires_grad_(False), pipeline.unet.requires_grad_(False)
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.to(device)
    velocities = pipeline.scheduler.config.prediction_type == "v_prediction"
    with torch.no_grad():
        given, free = pipeline.encode_prompt(options.prompt, device, 1, True)
    text = torch.cat([given, free])

    torch.manual_seed(options.seed)
    size = unet.config.sample_size * pipeline.vae_scale_factor
    picture = torch.nn.Parameter(0.1 * torch.randn(1, 3, size, size, device=device))
    optimizer = torch.optim.Adam([picture], lr=0.02)
    optimizer = picardopt.ParallelPicardOptimizer(
        optimizer, window=options.window, total_steps=options.steps, seed=options.seed
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        latents = vae.encode(picture).latent_dist.sample() * vae.config.scaling_factor
        level = torch.randint(20, 980, (1,), device=device)
        alpha = alphas[level].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        with torch.no_grad():
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            given, free = unet(noisy.repeat(2, 1, 1, 1), level, text).sample.chunk(2)
            found = free + 7.5 * (given - free)
            if velocities:
                found = alpha.sqrt() * found + (1 - alpha).sqrt() * noisy  # as noise
            gradient = (1 - alpha) * (found - noise)
        loss = 0.5 * (latents - (latents - gradient).detach()).square().sum()
        loss.backward()
        return loss

    for _ in range(options.steps):
        loss = optimizer.step(closure)

    stats = optimizer.stats
    print(
        f"loss {float(loss):.3g}; {stats.steps} steps in {stats.sweeps} sweeps ({stats.mean_stride:.2f} steps a sweep)"
    )


if __name__ == "__main__":
    main()
