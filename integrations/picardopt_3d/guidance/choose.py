"""Which score model a run is guided by, as options name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch

from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.loss_config import SdsConfig, VsdConfig
from picardopt_3d.guidance.protocol import Guidance, ScoreModel
from picardopt_3d.guidance.sds import ScoreDistillation
from picardopt_3d.models import GUIDANCE_MODELS, named
from picardopt_3d.prompts import ImagePrompt, PerpNeg, TextPrompt, ViewWords

Model = Literal["pixel-diffusion", "stable-diffusion", "deepfloyd", "zero123", "exact"]

Loss = Literal["sds", "vsd"]


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
        loss: What its scores are used in: "sds" (score distillation) or "vsd" (variational score distillation, which
            trains a LoRA of the model beside the scene; models that take a text only).
    """

    model: Model = "pixel-diffusion"
    source: str | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    negative: str = ""
    views: ViewWords | None = None
    perp_neg: PerpNeg | None = None
    loss: Loss = "sds"

    def __post_init__(self) -> None:
        """Check that there is a model to load.

        Raises:
            ValueError: There is not, or the texts do not go together.
        """
        if self.model not in get_args(Model):
            raise ValueError(f"model={self.model!r}: give one of {', '.join(get_args(Model))}")
        known = GUIDANCE_MODELS.get(self.model)
        if self.source is None and known is not None and known.shipped is None:
            raise ValueError(
                f"model={self.model!r} without a source: none of its kind ships; give a folder in diffusers' layout or "
                "a hub id"
            )
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss={self.loss!r}: give one of {', '.join(get_args(Loss))}")
        if self.loss == "vsd" and self.model in ("exact", "zero123"):
            raise ValueError(
                f"loss='vsd' with model={self.model!r}: its LoRA needs a network that takes a text; give "
                "pixel-diffusion, stable-diffusion or deepfloyd"
            )
        self.text_prompt("checked")

    def text_prompt(self, text: str) -> TextPrompt:
        """A text with all that is told of it."""
        return TextPrompt(text, self.negative, self.views, self.perp_neg)


_SHARED: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
"""Score models that are in use, by what they were loaded from."""


def load_guidance(
    config: GuidanceConfig,
    prompt: str | TextPrompt | ImagePrompt,
    size: int,
    device: torch.device | str,
    *,
    sds: SdsConfig | None = None,
    vsd: VsdConfig | None = None,
) -> Guidance:
    """Loads the guidance that the options name.

    As long as one guidance is in use, others of the same model share it, so that a recipe's stages hold one network.
    VSD changes the network that carries its LoRA, and has one of its own.

    Args:
        config: The score model, and which loss.
        prompt: As of `load_score`.
        size: As of `load_score`.
        device: As of `load_score`.
        sds: Numbers of score distillation.
        vsd: Numbers of variational score distillation.

    Raises:
        FileNotFoundError, PermissionError, ValueError: As of `load_score`; or VSD's LoRA is to be trained outside of
            the optimizer, which no run can do.
    """
    if config.loss == "vsd":
        # Here, not above: what needs it is rare.
        from picardopt_3d.guidance.vsd import VSD

        if vsd is not None and vsd.lora != "inside":
            raise ValueError(
                f'vsd.lora={vsd.lora!r}: a run trains the LoRA with the scene; give "inside"'
            )
        score: Any = load_score(config, prompt, size, device)
        return VSD(score, vsd)
    key: tuple[object, ...] = (config.model, config.source, config.options, str(device))
    if config.model == "exact":
        key += (str(prompt), size)
    shared: ScoreModel | None = _SHARED.get(key)
    if shared is None:
        shared = _SHARED[key] = load_score(config, prompt, size, device)
    return ScoreDistillation(shared, sds)


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
        # Here, not above: only this yardstick is made of the built-in world.
        from picardopt_3d.guidance.exact_score import exact_score_of

        return exact_score_of(prompt, size)
    given: dict[str, Any] = {} if config.source is None else {"source": _source(config.source)}
    # Named, not imported above: diffusers takes seconds to import, and the exact score needs none of it.
    loader = named(GUIDANCE_MODELS[config.model].loader)
    score: ScoreModel = loader.from_pretrained(**given, device=device, options=config.options)
    return score


def _source(source: str) -> str:
    """A folder if there is one of that name, "~" and all, else a hub id."""
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source
