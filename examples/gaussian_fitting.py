"""Gaussians fitted to a picture, splitting where the picture needs more of them: steps that change the model's size.

It is built like Gaussian-splatting codebases: one optimizer per tensor, gradient statistics in buffers, and every
`--every` steps a densification that replaces parameters and re-keys the optimizers' state. The densification is that of
the 3D scenes, so this needs picardopt-3d (`pip install "picardopt[3d]"`). picardopt has to know when a densification is
due (`restructure=`) and that closures rewrite the statistics (`carry=`).

    python examples/gaussian_fitting.py --window 8
    torchrun --nproc-per-node 4 examples/gaussian_fitting.py --image photo.png
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from picardopt_3d.scenes.gaussians import strategy
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import RunningStatistics
from PIL import Image, ImageDraw
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, Restructure


@dataclass(frozen=True)
class Config:
    """What is fitted and how.

    Attributes:
        image: A picture; a drawing of the script's own if none is given.
        size: It is scaled to this many pixels along a side.
        steps: Optimizer steps.
        window: Steps evaluated per sweep; None is one per process.
        tolerance: None is picardopt's default; 0 is the sequential run, bit for bit.
        across: Let windows run across densification, as the paper does; otherwise they end there.
        every: Densify after each so many steps, in the first three quarters of the run.
        count: Gaussians at the start.
        pixels: Random pixels per step.
        seed: Of the run.
        out: Where the fitted picture goes, if anywhere.
    """

    image: Path | None = None
    size: int = 64
    steps: int = 400
    window: int | None = 8
    tolerance: float | None = None
    across: bool = False
    every: int = 50
    count: int = 100
    pixels: int = 1024
    seed: int = 0
    out: Path | None = None


RATES = {"means": 1e-3, "log_scales": 5e-3, "opacity_logits": 1e-2, "colours": 5e-3}


class Gaussians(nn.Module):
    """Gaussians on the unit square with axes along its edges, added up: `colours` are signed."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        super().__init__()
        values = {
            "means": torch.rand(count, 2, generator=generator),
            "log_scales": torch.full((count, 2), -2.5),
            "opacity_logits": torch.zeros(count),
            "colours": torch.zeros(count, 3),
        }
        self.splats = nn.ParameterDict(values)
        self.statistics = RunningStatistics(count)

    def forward(self, points: Tensor) -> Tensor:
        """Returns the colours at points [n, 2]: [n, 3]."""
        offsets = points[:, None] - self.splats["means"]
        squared = (offsets * torch.exp(-self.splats["log_scales"])).square().sum(-1)
        weights = torch.exp(-0.5 * squared) * self.splats["opacity_logits"].sigmoid()
        return 0.5 + weights @ self.splats["colours"]


def load_image(config: Config) -> Tensor:
    """Returns the picture, RGB in [0, 1]. [size, size, 3]."""
    if config.image is not None:
        picture = Image.open(config.image).convert("RGB")
    else:
        picture = Image.new("RGB", (256, 256), "ivory")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((30, 40, 150, 160), fill="firebrick")
        draw.polygon([(120, 220), (230, 220), (175, 110)], fill="seagreen")
        draw.line([(20, 230), (240, 30)], fill="navy", width=8)
    picture = picture.resize((config.size, config.size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


class Fitting:
    """The task: a scene, its optimizers, the picture, and a step's closure."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.target = load_image(config).reshape(-1, 3)
        grid = (torch.arange(config.size) + 0.5) / config.size
        self.points = torch.cartesian_prod(grid, grid)
        self.scene = Gaussians(config.count, torch.Generator().manual_seed(config.seed))
        self.optimizers = {
            name: torch.optim.Adam([self.scene.splats[name]], lr=rate)
            for name, rate in RATES.items()
        }
        self.strategy = StrategyConfig(
            start=0,
            stop=int(0.75 * config.steps) + 1,
            every=config.every,
            gradient=3e-3,
            split_scale=0.05,
            least_opacity=0.1,
        )

    def due(self, step: int) -> bool:
        """Returns whether to densify after a step."""
        return strategy.due(self.strategy, step)

    def densify(self, step: int) -> Tensor:
        """Rewrites the scene and returns, for each of its rows, the row that it stems from."""
        splats, optimizers = dict(self.scene.splats.items()), list(self.optimizers.values())
        seen = self.scene.statistics.present()
        parents = strategy.apply(splats, optimizers, seen, self.strategy, step)
        self.scene.splats.update(splats)
        self.scene.statistics.reset(len(parents))
        return parents

    def wrap(self, restructure: Restructure | None) -> ParallelPicardOptimizer:
        """Returns the optimizer that runs ahead: the line that differs from a plain loop."""
        return ParallelPicardOptimizer(
            list(self.optimizers.values()),
            window=self.config.window,
            tolerance=self.config.tolerance,
            total_steps=self.config.steps,
            seed=self.config.seed,
            carry=self.scene,
            restructure=restructure,
        )

    def closure(self) -> Tensor:
        """Returns the loss of one step's random pixels; sets its gradients."""
        self.scene.zero_grad()
        chosen = torch.randint(len(self.points), (self.config.pixels,))
        loss = (self.scene(self.points[chosen]) - self.target[chosen]).square().mean()
        loss.backward()
        with torch.no_grad():  # the statistics that densification reads
            self.scene.statistics.gradients += self.scene.splats["means"].grad.norm(dim=1)
            self.scene.statistics.views += 1
        return loss

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Returns the fitted picture. [size, size, 3]."""
        return self.scene(self.points).view(self.config.size, self.config.size, 3)

    def psnr(self) -> float:
        """Returns the PSNR of the whole picture, dB."""
        error = (self.picture().view(-1, 3) - self.target).square().mean()
        return -10 * float(error.log10())


def main(config: Config) -> None:
    """Fits the picture and prints the result."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    task = Fitting(config)
    optimizer = task.wrap(Restructure(task.densify, task.due, across=config.across))
    for _ in range(config.steps):
        optimizer.step(task.closure)
    stats = optimizer.stats
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(
            f"{task.psnr():.2f} dB with {len(task.scene.splats['means'])} Gaussians after {stats.steps} steps in "
            f"{stats.sweeps} sweeps ({stats.mean_stride:.1f} steps a sweep)"
        )
        if config.out is not None:
            levels = (255 * task.picture().clamp(0, 1)).round().to(torch.uint8)
            Image.fromarray(levels.numpy()).save(config.out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
