"""Trains the autoencoder of the shipped latent models: 64-pixel views to 16 x 16 latents with 4 channels and back.

    python -m picardopt_3d.training.autoencoder --out training/autoencoder --images 300000

Writes `pipeline/`, an `AutoencoderKL` folder, and the other files that `picardopt_3d.training.text_to_view` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from picardopt_3d.training.loop import LoopConfig, Trainer, load_views, run
from picardopt_3d.training.models import build_autoencoder, half
from picardopt_3d.training.sheets import save_sheet, sheet_cameras
from picardopt_3d.world import COLOURS, SHAPES, Subject, all_subjects, render


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(LoopConfig):
    """Options of the autoencoder's training.

    Attributes:
        size: Pixels along a side.
        channels: Channels at each resolution; each resolution is half the one before.
        divergence: Weight of the KL divergence from the standard normal distribution, averaged over the latents.
        rough: Probability that a view looks like that of an unfinished optimization (`Views.rough`).
    """

    size: int = 64
    channels: tuple[int, ...] = (16, 32, 64)
    divergence: float = 1e-4
    rough: float = 0.5


class AutoencoderTrainer(Trainer):
    """Trains the encoder and the decoder."""

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        self.views = load_views(config, config.size, subjects=all_subjects())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.vae = build_autoencoder(config.size, config.channels)
        self.vae.to(memory_format=torch.channels_last)
        super().__init__(config, {"vae": self.vae})

    def loss(self) -> Tensor:
        """Returns the absolute plus the squared error of the pixels, plus the weighted divergence."""
        config, draw = self.config, self.views.draw(self.config.batch, self.generator)
        rough = torch.rand(config.batch, 1, 1, 1, generator=self.generator, device=config.device)
        views = torch.where(
            rough < config.rough, self.views.rough(draw, self.generator), self.views.clean(draw)
        )
        latents = self.vae.encode(views.contiguous(memory_format=torch.channels_last)).latent_dist
        mean, logvar = latents.mean.float(), latents.logvar.float()
        noise = torch.randn(mean.shape, generator=self.generator, device=config.device)
        decoded = self.vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        divergence: Tensor = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = functional.l1_loss(decoded, views) + functional.mse_loss(decoded, views)
        return error + config.divergence * divergence

    def save_model(self, folder: Path) -> None:
        """Writes the model, with the scaling factor that gives latents of true views unit variance."""
        generator = torch.Generator(self.config.device).manual_seed(0)
        latents = torch.cat(
            [
                self.vae.encode(self.views.clean(self.views.draw(64, generator))).latent_dist.mean
                for _ in range(16)
            ]
        )
        self.vae.register_to_config(scaling_factor=1 / latents.std().item())
        half(self.vae).save_pretrained(folder)

    def sample_sheet(self, path: Path) -> None:
        """Writes a picture with rows of views, each above a row of their reconstructions."""
        rows = []
        for shape, colour in list(zip(SHAPES, COLOURS, strict=True))[1::2]:
            size = self.config.size
            views, _ = render(Subject(shape, colour), sheet_cameras(), size, size)
            views = views.to(self.config.device)
            latents = self.vae.encode(2 * views - 1).latent_dist.mean
            rows += [views, self.vae.decode(latents).sample / 2 + 0.5]
        save_sheet(rows, path)


if __name__ == "__main__":
    run(AutoencoderTrainer(tyro.cli(AutoencoderConfig, description=__doc__)))
