"""The figures of the CLIP model: does it pick the right one of the built-in world's captions?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from picardopt_3d.cameras import random_cameras
from picardopt_3d.domain import all_subjects
from picardopt_3d.training.data import WIDE_CAMERAS, tokenize
from picardopt_3d.training.evaluate import EvaluationConfig, print_table, true_views


class ClipJudge:
    """Which of the captions fits views best?

    Args:
        folder: Of a CLIP model with tokenizer and image processor.
        captions: To choose from; by default the canonical ones of all subjects, in their order.
    """

    def __init__(self, folder: Path, captions: Sequence[str] | None = None) -> None:
        texts = [subject.caption for subject in all_subjects()] if captions is None else captions
        self.model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor: Any = CLIPImageProcessor.from_pretrained(folder)
        tokens = tokenize(CLIPTokenizer.from_pretrained(folder), texts)
        with torch.no_grad():
            pooled = self.model.get_text_features(input_ids=tokens).pooler_output
        self.texts = functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def similarity(self, views: Tensor) -> Tensor:
        """Cosine similarity of RGB views in [0, 1] and the captions. [views, captions]."""
        pictures = [(v.permute(1, 2, 0) * 255).round().byte().numpy() for v in views.cpu()]
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        pooled = self.model.get_image_features(pixel_values=pixels).pooler_output
        return functional.normalize(pooled, dim=-1) @ self.texts.T


def print_clip_table(config: EvaluationConfig) -> None:
    """R-precision of true views, and of blurred and noisy ones."""
    judge = ClipJudge(config.folder)
    rows = []
    for name, blur, noise in (("true views", 1, 0.0), ("blurred", 2, 0.0), ("noisy", 1, 0.1)):
        single, whole = r_precision(judge, config, blur, noise)
        rows.append((name, [100 * single, 100 * whole]))
    print_table(["R-precision over 64 captions", "single views", "all views together"], rows, "%")


def r_precision(
    judge: ClipJudge, config: EvaluationConfig, blur: int = 1, noise: float = 0.0
) -> tuple[float, float]:
    """Share of the subjects' views whose own caption fits best, one by one and by their mean similarity.

    Args:
        judge: Over the captions of all subjects.
        config: How many subjects and views.
        blur: Pixels that are averaged along each axis.
        noise: Standard deviation of the noise on the pixels.
    """
    torch.manual_seed(config.seed)
    size, single, whole = 64, [], []
    chosen = list(enumerate(all_subjects()))[:: config.every]
    cameras = random_cameras(config.views, WIDE_CAMERAS)
    truth = true_views([subject for _, subject in chosen], cameras, size)
    for (index, _), views in zip(chosen, truth, strict=True):
        views = functional.interpolate(functional.avg_pool2d(views, blur), size, mode="bilinear")
        views = (views + noise * torch.randn(views.shape)).clamp(0, 1)
        found = judge.similarity(views)
        single.append((found.argmax(-1) == index).float().mean().item())
        whole.append(float(found.mean(0).argmax().item() == index))
    return sum(single) / len(single), sum(whole) / len(whole)
