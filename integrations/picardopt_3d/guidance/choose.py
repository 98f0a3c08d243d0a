"""Which score model a run is guided by, as options name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from picardopt_3d.domain import COLOURS, Subject, parse_prompt
from picardopt_3d.guidance.exact_score import ExactScore, RenderedSubjects
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.protocol import ScoreModel, as_text_prompt
from picardopt_3d.prompts import ImagePrompt, PerpNeg, TextPrompt, ViewWords

Model = Literal["pixel-diffusion", "stable-diffusion", "deepfloyd", "zero123", "exact"]

_SHIPPED = ("pixel-diffusion", "zero123")


@dataclass(frozen=True)
class GuidanceConfig:
    """A score model, and what it is told of a text.

    Attributes:
        model: Its kind; "exact" is the closed-form score of the true views of the prompt's shape in all colours, a
            yardstick that knows the built-in world only.
        source: A folder in diffusers' layout or a hub id; None: the model that ships (kinds pixel-diffusion, zero123).
        options: How it is loaded and run.
        negative: What a text is pushed away from.
        views: What a model that is not told the camera hears of it; None: the same text for every view.
        perp_neg: Push away from neighbouring views; needs `views`.
    """

    model: Model = "pixel-diffusion"
    source: str | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    negative: str = ""
    views: ViewWords | None = None
    perp_neg: PerpNeg | None = None

    def __post_init__(self) -> None:
        """Check that there is a model to load.

        Raises:
            ValueError: There is not, or the texts do not go together.
        """
        if self.model not in get_args(Model):
            raise ValueError(f"model={self.model!r}: give one of {', '.join(get_args(Model))}")
        if self.source is None and self.model not in (*_SHIPPED, "exact"):
            raise ValueError(
                f"model={self.model!r} without a source: none of its kind ships; give a folder in diffusers' layout or "
                "a hub id"
            )
        self.text_prompt("checked")

    def text_prompt(self, text: str) -> TextPrompt:
        """A text with all that is told of it."""
        return TextPrompt(text, self.negative, self.views, self.perp_neg)


def load_score(
    config: GuidanceConfig,
    prompt: str | TextPrompt | ImagePrompt,
    size: int,
    device: torch.device | str,
) -> ScoreModel:
    """Load the score model that the options name.

    Args:
        config: The options.
        prompt: What the run is asked for; the exact score is made for it.
        size: Pixels along a side of the exact score's views.
        device: Where the model computes.

    Raises:
        FileNotFoundError: It cannot be had; the message says what to do (so for all that follow).
        PermissionError: It is gated.
        ValueError: It is of another class, or the exact score does not know the prompt.
    """
    if config.model == "exact":
        return _exact(prompt, size)
    # Here, not above: diffusers takes seconds to import, and the exact score needs none of it.
    given: dict[str, Any] = {} if config.source is None else {"source": _source(config.source)}
    given |= {"device": device, "options": config.options}
    if config.model == "pixel-diffusion":
        from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion

        return PixelDiffusion.from_pretrained(**given)
    if config.model == "stable-diffusion":
        from picardopt_3d.guidance.stable_diffusion import StableDiffusion

        return StableDiffusion.from_pretrained(**given)
    if config.model == "deepfloyd":
        from picardopt_3d.guidance.deepfloyd import DeepFloyd

        return DeepFloyd.from_pretrained(**given)
    from picardopt_3d.guidance.zero123 import Zero123

    return Zero123.from_pretrained(**given)


def _source(source: str) -> str:
    """A folder if there is one of that name, "~" and all, else a hub id."""
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source


def _exact(prompt: str | TextPrompt | ImagePrompt, size: int) -> ExactScore:
    text = "a picture" if isinstance(prompt, ImagePrompt) else as_text_prompt(prompt).text
    subject = parse_prompt(text)
    if subject is None:
        raise ValueError(
            f"prompt={text!r}: the exact guidance only knows the "
            'built-in shapes and colours; ask for one of those, e.g. "a red cube", or use another guidance model'
        )
    # The prompt's shape in every colour, so that there is something to be guided away from.
    known = [Subject(subject.shape, colour) for colour in COLOURS]
    return ExactScore(RenderedSubjects(known, size))
