"""Trains the pixel model that ships with the package: a caption and a camera in, a view out.

    python -m picardopt_3d.training.text_to_view --out training/text-to-view --images 300000

Writes to `--out`: the rendered views, a checkpoint every few minutes (the same command resumes from it, with the same
result as an uninterrupted run), a sheet of samples, the loss curve, and `pipeline/`, a diffusers pipeline folder with
the averaged weights in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import DDPMScheduler
from torch import Tensor

from picardopt_3d.guidance.text_to_view import TextToViewPipeline
from picardopt_3d.training.data import caption_table, tokenize
from picardopt_3d.training.diffusion import velocity_loss
from picardopt_3d.training.loop import LoopConfig, Trainer, load_views, run
from picardopt_3d.training.models import (
    TextSizes,
    UNetSizes,
    build_tokenizer_and_text_encoder,
    build_unet,
    half,
)
from picardopt_3d.training.sheets import save_sheet, sheet_cameras
from picardopt_3d.world import COLOURS, SHAPES, Subject


@dataclass(frozen=True, kw_only=True)
class TextToViewConfig(LoopConfig):
    """Options of the pixel model's training.

    Attributes:
        drop_caption: Probability that an image has no caption (for classifier-free guidance).
        drop_camera: Probability that an image has no camera.
        size: Pixels along a side.
        unet: Sizes of the score model.
        text: Sizes of the text encoder.
    """

    drop_caption: float = 0.1
    drop_camera: float = 0.1
    size: int = 32
    unet: UNetSizes = field(default_factory=lambda: UNetSizes((32, 64, 96), (False, False, True)))
    text: TextSizes = field(default_factory=TextSizes)


def build_pipeline(config: TextToViewConfig) -> TextToViewPipeline:
    """Returns the untrained pipeline, initialized by torch's global generator."""
    tokenizer, text_encoder = build_tokenizer_and_text_encoder(config.text)
    unet = build_unet(config.unet, config.size, 3, 3, config.text.channels, camera=True)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return TextToViewPipeline(unet, text_encoder, tokenizer, scheduler)


def save_half_precision(pipeline: TextToViewPipeline, folder: Path) -> None:
    """Writes a pipeline folder with fp16 safetensors weights; the pipeline itself is unchanged."""
    TextToViewPipeline(
        half(pipeline.unet), half(pipeline.text_encoder), pipeline.tokenizer, pipeline.scheduler
    ).save_pretrained(folder, safe_serialization=True)


class TextToViewTrainer(Trainer):
    """Trains the UNet and the text encoder together."""

    config: TextToViewConfig

    def __init__(self, config: TextToViewConfig) -> None:
        self.views = load_views(config, config.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.pipeline = build_pipeline(config)
        self.unet, self.text_encoder = self.pipeline.unet, self.pipeline.text_encoder
        self.unet.to(memory_format=torch.channels_last)
        super().__init__(config, {"unet": self.unet, "text_encoder": self.text_encoder})
        self.captions = caption_table(self.pipeline.tokenizer).to(config.device)[..., 0, :]
        self.no_caption = tokenize(self.pipeline.tokenizer, [""]).to(config.device)

    def loss(self) -> Tensor:
        """Returns the squared error of the predicted velocity."""
        config, draw = self.config, self.views.draw(self.config.batch, self.generator)
        chances = torch.rand(3, config.batch, 1, generator=self.generator, device=config.device)
        phrase = (chances[2, :, 0] * self.captions.shape[2]).long()
        tokens = self.captions[draw.shape, draw.colour, phrase]
        tokens = torch.where(chances[0] < config.drop_caption, self.no_caption, tokens)
        conditions = self.views.conditions[draw.shape, draw.view]
        return velocity_loss(
            self.unet,
            self.pipeline.scheduler,
            self.views.clean(draw),
            self.generator,
            encoder_hidden_states=self.text_encoder(tokens).last_hidden_state,
            class_labels=conditions * (chances[1] >= config.drop_camera),
        )

    def save_model(self, folder: Path) -> None:
        """Writes the pipeline folder."""
        save_half_precision(self.pipeline, folder)

    def sample_sheet(self, path: Path) -> None:
        """Writes a picture of each shape in one colour from six cameras."""
        cameras = sheet_cameras()
        self.pipeline.set_progress_bar_config(disable=True)
        rows = [
            self.pipeline(
                [Subject(shape, colour).caption] * len(cameras),
                cameras.to(self.config.device),
                num_inference_steps=self.config.sample_steps,
                generator=torch.Generator().manual_seed(0),
            )
            for shape, colour in zip(SHAPES, COLOURS, strict=True)
        ]
        save_sheet(rows, path)


if __name__ == "__main__":
    run(TextToViewTrainer(tyro.cli(TextToViewConfig, description=__doc__)))
