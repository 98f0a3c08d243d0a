"""A coordinate network fitted to a picture (SIREN, arXiv 2006.09661): many small steps on random pixels.

Every step draws its own pixels from torch's global generator, which picardopt seeds from the step. So a step can be
evaluated ahead of time, on any process, and more than once.

    python examples/image_fitting.py --window 8
    torchrun --nproc-per-node 4 examples/image_fitting.py --image photo.png --out fitted.png
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer


@dataclass(frozen=True)
class Config:
    """What is fitted and how.

    Attributes:
        image: A picture; a drawing of the script's own if none is given.
        size: It is scaled to this many pixels along a side.
        steps: Optimizer steps.
        window: Steps evaluated per sweep; None is one per process.
        tolerance: None is picardopt's default; 0 is the sequential run, bit for bit.
        rate: Learning rate at the start; it falls to a tenth along a cosine.
        pixels: Random pixels per step.
        width: Of the network's two hidden layers.
        seed: Of the run.
        out: Where the fitted picture goes, if anywhere.
    """

    image: Path | None = None
    size: int = 96
    steps: int = 600
    window: int | None = 8
    tolerance: float | None = None
    rate: float = 1e-3
    pixels: int = 1024
    width: int = 64
    seed: int = 0
    out: Path | None = None


class Sine(nn.Module):
    """A linear layer and a sine, initialized as in the paper."""

    def __init__(self, inputs: int, outputs: int, frequency: float, bound: float) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(inputs, outputs), frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`sin(frequency * (W x + b))`."""
        return torch.sin(self.frequency * self.linear(x))


def make_network(width: int) -> nn.Module:
    """Returns a network that gives the colours at points of [-1, 1]^2."""
    bound = (6 / width) ** 0.5
    return nn.Sequential(
        Sine(2, width, 30.0, 0.5),
        Sine(width, width, 1.0, bound),
        Sine(width, width, 1.0, bound),
        nn.Linear(width, 3),
    )


def load_image(config: Config) -> Tensor:
    """Returns the picture, RGB in [0, 1]. [size, size, 3]."""
    if config.image is not None:
        picture = Image.open(config.image).convert("RGB")
    else:
        picture = Image.new("RGB", (256, 256), "ivory")
        draw = ImageDraw.Draw(picture)
        for radius in range(120, 0, -24):
            colour = "firebrick" if radius % 48 else "navy"
            draw.ellipse((128 - radius, 128 - radius, 128 + radius, 128 + radius), fill=colour)
        draw.polygon([(30, 240), (226, 240), (128, 150)], fill="seagreen")
    picture = picture.resize((config.size, config.size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


def main(config: Config) -> None:
    """Fits the picture and prints the result."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    target = load_image(config).reshape(-1, 3)
    axis = torch.linspace(-1, 1, config.size)
    points = torch.cartesian_prod(axis, axis)
    torch.manual_seed(config.seed)
    network = make_network(config.width)

    optimizer = torch.optim.Adam(network.parameters(), lr=config.rate)
    optimizer = ParallelPicardOptimizer(
        optimizer,
        window=config.window,
        tolerance=config.tolerance,
        total_steps=config.steps,
        seed=config.seed,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config.steps, eta_min=config.rate / 10
    )
    optimizer.lr_scheduler = scheduler  # so that it knows the rates of future steps

    def closure() -> Tensor:
        optimizer.zero_grad()
        chosen = torch.randint(len(points), (config.pixels,))
        loss = (network(points[chosen]) - target[chosen]).square().mean()
        loss.backward()
        return loss

    for _ in range(config.steps):
        optimizer.step(closure)
        scheduler.step()

    stats = optimizer.stats
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with torch.no_grad():
            fitted = network(points)
        psnr = -10 * float((fitted - target).square().mean().log10())
        print(
            f"{psnr:.2f} dB after {stats.steps} steps in {stats.sweeps} sweeps "
            f"({stats.mean_stride:.1f} steps a sweep)"
        )
        if config.out is not None:
            levels = (255 * fitted.clamp(0, 1)).round().to(torch.uint8)
            Image.fromarray(levels.view(config.size, config.size, 3).numpy()).save(config.out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
