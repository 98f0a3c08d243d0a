"""Trains the latent model that ships with the package, a small Stable Diffusion pipeline.

    python -m picardopt_3d.training.latent_text_to_view --out training/latent --vae training/autoencoder/pipeline

Its captions end in words for the view (", front view", ...), like the view-dependent prompts of large models. Writes
`pipeline/`, a `StableDiffusionPipeline` folder, and the other files that `picardopt_3d.training.text_to_view` lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.prompts import ViewWords
from picardopt_3d.training.data import caption_table, tokenize
from picardopt_3d.training.diffusion import velocity_loss
from picardopt_3d.training.loop import LoopConfig, Trainer, load_views, run
from picardopt_3d.training.models import (
    TextSizes,
    UNetSizes,
    build_tokenizer_and_text_encoder,
    build_unet,
    half,
    latent_scheduler,
)
from picardopt_3d.training.sheets import save_sheet
from picardopt_3d.world import COLOURS, SHAPES, Subject


@dataclass(frozen=True, kw_only=True)
class LatentTextToViewConfig(LoopConfig):
    """Options of the latent model's training.

    Attributes:
        vae: Folder of the trained autoencoder.
        drop_caption: Probability that an image has no caption (for classifier-free guidance).
        drop_words: Probability that its caption has no words for the view.
        unet: Sizes of the score model.
        text: Sizes of the text encoder.
    """

    vae: Path
    drop_caption: float = 0.1
    drop_words: float = 0.15
    unet: UNetSizes = field(default_factory=lambda: UNetSizes((48, 96), (True, True)))
    text: TextSizes = field(default_factory=TextSizes)


class LatentTextToViewTrainer(Trainer):
    """Trains the UNet and the text encoder together, on a trained autoencoder."""

    config: LatentTextToViewConfig

    def __init__(self, config: LatentTextToViewConfig) -> None:
        self.vae = AutoencoderKL.from_pretrained(config.vae, low_cpu_mem_usage=False).float()
        self.vae.to(config.device, memory_format=torch.channels_last).requires_grad_(False).eval()
        self.views = load_views(config, self.vae.config.sample_size)
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels = self.vae.config.latent_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.tokenizer, self.text_encoder = build_tokenizer_and_text_encoder(config.text)
            size = self.vae.config.sample_size // shrink
            self.unet = build_unet(config.unet, size, channels, channels, config.text.channels)
        self.unet.to(memory_format=torch.channels_last)
        super().__init__(config, {"unet": self.unet, "text_encoder": self.text_encoder})
        self.scheduler = latent_scheduler()
        said = ViewWords()
        captions = caption_table(self.tokenizer, lambda text: (text, *said.texts(text)))
        self.captions = captions.to(config.device)
        self.directions = torch.stack(
            [said.directions(orbit_cameras(*pose.unbind(-1))) for pose in self.views.poses]
        )  # [shapes, views]
        self.no_caption = tokenize(self.tokenizer, [""]).to(config.device)

    def loss(self) -> Tensor:
        """Returns the squared error of the predicted velocity of latents."""
        config, draw = self.config, self.views.draw(self.config.batch, self.generator)
        chances = torch.rand(3, config.batch, generator=self.generator, device=config.device)
        phrase = (chances[2] * self.captions.shape[2]).long()
        direction = self.directions[draw.shape, draw.view]
        words = (1 + direction) * (chances[1] >= config.drop_words)
        tokens = self.captions[draw.shape, draw.colour, phrase, words]
        tokens = torch.where(chances[0, :, None] < config.drop_caption, self.no_caption, tokens)
        with torch.no_grad():
            views = self.views.clean(draw).contiguous(memory_format=torch.channels_last)
            posterior = self.vae.encode(views).latent_dist
            noise = torch.randn(
                posterior.mean.shape, generator=self.generator, device=config.device
            )
            latents = posterior.mean.float() + posterior.std.float() * noise
        return velocity_loss(
            self.unet,
            self.scheduler,
            latents * self.vae.config.scaling_factor,
            self.generator,
            encoder_hidden_states=self.text_encoder(tokens).last_hidden_state,
        )

    def save_model(self, folder: Path) -> None:
        """Writes the pipeline folder."""
        parts = {"vae": half(self.vae), "unet": half(self.unet)}
        self._pipeline(text_encoder=half(self.text_encoder), **parts).save_pretrained(folder)

    def _pipeline(self, **parts: object) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )

    def sample_sheet(self, path: Path) -> None:
        """Writes a picture of each shape in one colour, without words for the view and with those of each direction."""
        pipeline = self._pipeline(vae=self.vae, unet=self.unet, text_encoder=self.text_encoder)
        pipeline.set_progress_bar_config(disable=True)
        rows = []
        for shape, colour in zip(SHAPES, COLOURS, strict=True):
            caption = Subject(shape, colour).caption
            prompts = [caption, *ViewWords().texts(caption)]
            views = pipeline(
                prompts,
                guidance_scale=3.0,
                num_inference_steps=self.config.sample_steps,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
            rows.append(views)
        save_sheet(rows, path)


if __name__ == "__main__":
    run(LatentTextToViewTrainer(tyro.cli(LatentTextToViewConfig, description=__doc__)))
