"""Score distillation in twenty lines: views of an object, optimized until a diffusers pipeline finds them likely.

The parameters are the pixels of a few views. In every step a text-to-image model says what noise it sees in them (SDS,
arXiv 2209.14988). The model ships with picardopt-3d as an ordinary diffusers folder. To use another one, change how it
is loaded and called. picardopt is made for such small batches and thousands of steps.

    python examples/score_distillation.py --prompt "a blue chair" --out views.png
    torchrun --nproc-per-node 4 examples/score_distillation.py --window 4
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.guidance.pixel_diffusion import SHIPPED
from picardopt_3d.guidance.text_to_view import TextToViewPipeline
from picardopt_3d.world import parse_prompt, render
from PIL import Image
from torch import Tensor

from picardopt import ParallelPicardOptimizer


@dataclass(frozen=True)
class Config:
    """What is drawn and how.

    Attributes:
        prompt: A shape and a colour that the model knows.
        views: How many, around the object.
        steps: Optimizer steps.
        window: Steps evaluated per sweep; None is one per process.
        tolerance: None is picardopt's default; 0 is the sequential run, bit for bit.
        rate: Learning rate.
        guidance: Strength of classifier-free guidance.
        seed: Of the run.
        out: Where the views go, if anywhere.
    """

    prompt: str = "a red mug"
    views: int = 2
    steps: int = 200
    window: int | None = 8
    tolerance: float | None = None
    rate: float = 0.03
    guidance: float = 7.5
    seed: int = 0
    out: Path | None = None


def psnr(views: Tensor, truth: Tensor) -> float:
    """Returns how close the views are to the true ones, dB."""
    return -10 * float((views - truth).square().mean().log10())


def main(config: Config) -> None:
    """Draws the views and prints how close they are."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    pipeline = TextToViewPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    unet, alphas = pipeline.unet.requires_grad_(False), pipeline.scheduler.alphas_cumprod
    cameras = turntable_cameras(config.views, elevation=20.0)
    with torch.no_grad():
        text = pipeline.encode([config.prompt] * config.views + [""] * config.views)
    camera = cameras.condition().repeat(2, 1)

    # -- the twenty lines ----------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    size = unet.config.sample_size
    pixels = torch.nn.Parameter(0.1 * torch.randn(config.views, 3, size, size))  # in [-1, 1]
    optimizer = torch.optim.Adam([pixels], lr=config.rate, betas=(0.9, 0.99))
    optimizer = ParallelPicardOptimizer(
        optimizer,
        window=config.window,
        tolerance=config.tolerance,
        total_steps=config.steps,
        seed=config.seed,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        level = torch.randint(20, 980, (config.views,))
        alpha = alphas[level].view(-1, 1, 1, 1)
        noise = torch.randn_like(pixels)
        noisy = alpha.sqrt() * pixels.detach() + (1 - alpha).sqrt() * noise
        with torch.no_grad():
            both = unet(noisy.repeat(2, 1, 1, 1), level.repeat(2), text, class_labels=camera).sample
        given, free = both.chunk(2)
        velocity = free + config.guidance * (given - free)
        predicted = alpha.sqrt() * velocity + (1 - alpha).sqrt() * noisy  # as noise
        gradient = (1 - alpha) * (predicted - noise)
        loss = 0.5 * (pixels - (pixels - gradient).detach()).square().sum() / config.views
        loss.backward()
        return loss

    for _ in range(config.steps):
        optimizer.step(closure)
    # ------------------------------------------------------------------------------------------------

    views = (pixels.detach() / 2 + 0.5).clamp(0, 1)
    stats = optimizer.stats
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        truth = render(parse_prompt(config.prompt), cameras, size, size)[0]
        print(
            f"{psnr(views, truth):.2f} dB to the true views (grey: {psnr(0.5 + 0 * views, truth):.2f}) after "
            f"{stats.steps} steps in {stats.sweeps} sweeps ({stats.mean_stride:.1f} steps a sweep)"
        )
        if config.out is not None:
            row = torch.cat(list(views), dim=2).permute(1, 2, 0)  # [size, views * size, 3]
            picture = Image.fromarray((255 * row).round().to(torch.uint8).numpy())
            picture.resize((4 * picture.width, 4 * picture.height)).save(config.out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
