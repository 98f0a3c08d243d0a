"""How good a shipped model is, in figures: the tables of its model card.

    python -m picardopt_3d.training.evaluate [--folder FOLDER]

The folder says what it is: a text-to-view model in pixels or in latents, a Zero-1-to-3 twin, or a CLIP model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from picardopt_3d.cameras import Cameras, random_cameras
from picardopt_3d.domain import (
    COLOURS,
    Subject,
    all_subjects,
    colourize,
    held_out_subjects,
    render_shading,
)
from picardopt_3d.guidance.pixel_diffusion import SHIPPED, PixelDiffusion
from picardopt_3d.guidance.protocol import ScoreModel
from picardopt_3d.training.data import WIDE_CAMERAS, trained_subjects


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
        folder: The model's folder.
        levels: Noise levels, as timesteps.
        every: Every n-th subject of the built-in world.
        views: Random cameras, the same for all subjects.
        sample_steps: Denoising steps where samples are drawn.
        scales: Strengths of classifier-free guidance that samples are drawn with.
        seed: Of the cameras and the noise.
        device: Where the model runs.
    """

    folder: Path = SHIPPED
    levels: tuple[int, ...] = (100, 300, 500, 700, 850, 950)
    every: int = 5
    views: int = 8
    sample_steps: int = 50
    scales: tuple[float, ...] = (1.0, 3.0)
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Denoising:
    """PSNR of denoised views at one noise level, dB.

    Attributes:
        right: With the caption and the view's own camera.
        no_caption: Without the caption.
        wrong_camera: With another view's camera.
    """

    right: float
    no_caption: float
    wrong_camera: float


def denoising(
    score: ScoreModel,
    level: int,
    config: EvaluationConfig,
    subjects: Sequence[Subject] | None = None,
) -> Denoising:
    """Denoise true views from one noise level.

    Args:
        score: The model.
        level: The timestep.
        config: Which views.
        subjects: Of what; by default every n-th of all subjects.
    """
    torch.manual_seed(config.seed)
    cameras = random_cameras(config.views, WIDE_CAMERAS)
    turned = cameras[torch.arange(config.views).roll(config.views // 2)]
    timesteps = torch.full((config.views,), level)
    abar = score.alphas_cumprod[level]
    errors: list[Tensor] = []
    chosen = all_subjects()[:: config.every] if subjects is None else subjects
    views = true_views(chosen, cameras, score.size)
    for subject, clean in zip(chosen, 2 * views - 1, strict=True):
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * torch.randn(clean.shape)
        prompt = score.encode(subject.caption)
        right = score.predict_noise(noisy, timesteps, prompt, cameras)
        wrong = score.predict_noise(noisy, timesteps, prompt, turned)
        guesses = torch.stack([right.conditional, right.unconditional, wrong.conditional])
        denoised = (noisy - (1 - abar).sqrt() * guesses) / abar.sqrt()
        errors.append(((denoised - clean) / 2).square().mean(dim=(1, 2, 3, 4)))
    return Denoising(*(-10 * torch.stack(errors).mean(0).log10()).tolist())


def true_views(subjects: Sequence[Subject], cameras: Cameras, size: int) -> Tensor:
    """What is to be seen, RGB in [0, 1]; each shape is rendered once. [subjects, cameras, 3, size, size]."""
    shaded = {
        shape: render_shading(shape, cameras, size, size)
        for shape in dict.fromkeys(subject.shape for subject in subjects)
    }
    return torch.stack(
        [
            colourize(shaded[subject.shape], torch.tensor(COLOURS[subject.colour]))
            for subject in subjects
        ]
    )


def groups(config: EvaluationConfig) -> dict[str, Sequence[Subject]]:
    """What the text models are evaluated on: subjects that they were trained on, and the others."""
    return {"trained": trained_subjects()[:: config.every], "held out": held_out_subjects()}


def kind_of(folder: Path) -> str:
    """The class that a folder's own index names.

    Raises:
        ValueError: The folder holds no model that is known here.
    """
    for name, entry in (("model_index.json", "_class_name"), ("config.json", "architectures")):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text()).get(entry)
            kind = found[0] if isinstance(found, list) else found
            if kind in EVALUATIONS:
                return str(kind)
    raise ValueError(
        f"folder={str(folder)!r} holds none of {', '.join(EVALUATIONS)}: give a model that a training wrote"
    )


def _pixels(config: EvaluationConfig) -> None:
    score = PixelDiffusion.from_pretrained(config.folder)
    for name, subjects in groups(config).items():
        rows = []
        for level in config.levels:
            found = denoising(score, level, config, subjects)
            values = [found.right, found.no_caption, found.wrong_camera]
            rows.append((f"{level} ({score.alphas_cumprod[level].item():.3f})", values))
        heads = [f"noise level (abar), {name} subjects", "right", "no caption", "wrong camera"]
        print_table(heads, rows)


def _latents(config: EvaluationConfig) -> None:
    from picardopt_3d.training.evaluate_latent import print_latent_tables

    print_latent_tables(config)


def _zero123(config: EvaluationConfig) -> None:
    from picardopt_3d.training.evaluate_latent import print_zero123_tables

    print_zero123_tables(config)


def _clip(config: EvaluationConfig) -> None:
    from picardopt_3d.training.evaluate_clip import print_clip_table

    print_clip_table(config)


EVALUATIONS: dict[str, Callable[[EvaluationConfig], None]] = {
    "TextToViewPipeline": _pixels,
    "StableDiffusionPipeline": _latents,
    "Zero123Pipeline": _zero123,
    "CLIPModel": _clip,
}


def print_table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], unit: str = "dB"
) -> None:
    """Print figures as a Markdown table."""
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, values in rows:
        print("| " + " | ".join([name, *(f"{value:.1f} {unit}" for value in values)]) + " |")
    print(flush=True)


def main(config: EvaluationConfig) -> None:
    """Print the tables of the model that the folder holds."""
    with torch.no_grad():
        EVALUATIONS[kind_of(config.folder)](config)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, description=__doc__))
