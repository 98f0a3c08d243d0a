"""Trains the CLIP model that ships with the package, which matches views to the built-in world's captions.

    python -m picardopt_3d.training.clip --out training/clip --images 300000

Writes `pipeline/`, a transformers `CLIPModel` folder with its tokenizer and image processor, and the other files that
`picardopt_3d.training.text_to_view` lists. The model judges results, so that it is trained on all subjects, with views
that look like those of unfinished optimizations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from picardopt_3d.compat import CLIPImageProcessorPil
from picardopt_3d.training.data import caption_table
from picardopt_3d.training.loop import LoopConfig, Trainer, load_views, run
from picardopt_3d.training.models import (
    TextSizes,
    VisionSizes,
    build_tokenizer,
    half,
    known_texts,
    text_config,
    vision_config,
)
from picardopt_3d.training.sheets import save_sheet
from picardopt_3d.world import CAPTIONS, COLOURS, SHAPES, all_subjects


@dataclass(frozen=True, kw_only=True)
class ClipConfig(LoopConfig):
    """Options of the CLIP model's training.

    Attributes:
        vision: Sizes of the image encoder.
        text: Sizes of the text encoder.
    """

    vision: VisionSizes = field(default_factory=VisionSizes)
    text: TextSizes = field(default_factory=TextSizes)


class ClipTrainer(Trainer):
    """Trains both encoders."""

    config: ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        size = config.vision.size
        self.views = load_views(config, size, subjects=all_subjects())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.tokenizer = build_tokenizer(known_texts(), config.text.tokens)
            embedding = config.vision.embedding
            text = text_config(config.text, self.tokenizer, embedding)
            vision = vision_config(config.vision)
            self.model = CLIPModel(
                CLIPConfig(
                    text_config=text.to_dict(),
                    vision_config=vision.to_dict(),
                    projection_dim=embedding,
                )
            )
        self.processor = CLIPImageProcessorPil(
            size={"height": size, "width": size}, do_center_crop=False
        )
        super().__init__(config, {"clip": self.model})
        self.captions = caption_table(self.tokenizer).to(config.device)[..., 0, :]
        self.mean, self.std = (
            torch.tensor(values, device=config.device)[:, None, None]
            for values in (self.processor.image_mean, self.processor.image_std)
        )

    def loss(self) -> Tensor:
        """Returns the contrastive loss: views against all subjects' captions, captions against the batch's views."""
        config, draw = self.config, self.views.draw(self.config.batch, self.generator)
        count = len(SHAPES) * len(COLOURS)
        phrase = torch.randint(
            len(CAPTIONS), (count,), generator=self.generator, device=config.device
        )
        captions = self.captions.flatten(0, 1)[torch.arange(count, device=config.device), phrase]
        views = self.views.rough(draw, self.generator) / 2 + 0.5
        self.model.logit_scale.data.clamp_(max=math.log(100))  # as in OpenAI's CLIP
        logits: Tensor = self.model(
            input_ids=captions, pixel_values=(views - self.mean) / self.std
        ).logits_per_image.float()  # [batch, subjects]
        subject = draw.shape * len(COLOURS) + draw.colour
        shown = functional.one_hot(subject, count).float()
        seen = shown.sum(
            0
        )  # views of each subject in the batch; captions without a view do not count
        of_captions = -(shown * logits.log_softmax(0)).sum(0) / seen.clamp(min=1)
        of_captions = of_captions.sum() / (seen > 0).sum()
        return 0.5 * (functional.cross_entropy(logits, subject) + of_captions)

    def save_model(self, folder: Path) -> None:
        """Writes the model, the tokenizer and the image processor."""
        for part in (half(self.model), self.tokenizer, self.processor):
            part.save_pretrained(folder)

    def sample_sheet(self, path: Path) -> None:
        """Writes a picture of training views: random subjects, as in unfinished optimizations."""
        generator = torch.Generator(self.config.device).manual_seed(0)
        views = self.views.rough(self.views.draw(48, generator), generator) / 2 + 0.5
        save_sheet(list(views.split(8)), path)


if __name__ == "__main__":
    run(ClipTrainer(tyro.cli(ClipConfig, description=__doc__)))
