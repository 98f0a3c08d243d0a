"""The choice of the score model and the loss of a run, by options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch

from picardopt_3d.guidance.loading import ModelOptions, read_index
from picardopt_3d.guidance.loss_config import SdsConfig, VsdConfig
from picardopt_3d.guidance.protocol import Guidance, ScoreModel
from picardopt_3d.guidance.sds import ScoreDistillation
from picardopt_3d.models import GUIDANCE_MODELS, named
from picardopt_3d.prompts import ImagePrompt, PerpNeg, TextPrompt, ViewWords

Model = Literal["pixel-diffusion", "stable-diffusion", "deepfloyd", "zero123", "exact"]

Loss = Literal["sds", "vsd"]


@dataclass(frozen=True)
class GuidanceConfig:
    """A score model, its prompts, and the loss that uses its scores.

    Attributes:
        model: Kind of the model; "exact" is the closed-form score of the true views of the prompt's shape in all
            colours, a yardstick that covers only the built-in world.
        source: A folder in diffusers' layout or a hub id; None: the model that ships (of all kinds but deepfloyd).
        options: How the model is loaded and run.
        negative: Negative prompt.
        views: Words for the view, for models that do not take the camera; None: the same text for every view.
        perp_neg: Perp-Neg, which pushes away from the texts of neighboring views; needs `views`.
        loss: "sds" (score distillation) or "vsd" (variational score distillation, which trains a LoRA of the model
            beside the scene; only for models that take a text).
    """

    model: Model = "pixel-diffusion"
    source: str | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    negative: str = ""
    views: ViewWords | None = None
    perp_neg: PerpNeg | None = None
    loss: Loss = "sds"

    def __post_init__(self) -> None:
        """Checks the names and the texts.

        Raises:
            ValueError: There is no such model or loss, or the options exclude each other.
        """
        if self.model not in get_args(Model):
            raise ValueError(f"model={self.model!r}: give one of {', '.join(get_args(Model))}")
        known = GUIDANCE_MODELS.get(self.model)
        if self.source is None and known is not None and known.shipped is None:
            raise ValueError(
                f"model={self.model!r} without a source: no model of this kind ships; give a folder in diffusers' "
                "layout or a hub id"
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
        """Returns a text as a prompt with the negative prompt and the words for the view."""
        return TextPrompt(text, self.negative, self.views, self.perp_neg)


_SHARED: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
"""Score models that are in use, by kind, source, options and device."""


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

    Guidances of the same model share its network, so that a recipe's stages hold it in memory once. VSD loads a network
    of its own, because its LoRA changes it.

    Args:
        config: The score model and the loss.
        prompt: See `load_score`.
        size: See `load_score`.
        device: See `load_score`.
        sds: Options of score distillation.
        vsd: Options of variational score distillation.

    Raises:
        FileNotFoundError: See `load_score`.
        PermissionError: See `load_score`.
        ValueError: See `load_score`; or `vsd.lora` is not "inside".
    """
    if config.loss == "vsd":
        # Imported here because few runs need it.
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
    """Loads the score model that the options name.

    Args:
        config: The options.
        prompt: The prompt of the run; the exact score is built for it.
        size: Pixels along a side of the exact score's views.
        device: Device of the model.

    Raises:
        FileNotFoundError: The model cannot be found or downloaded; the message names the remedy.
        PermissionError: The model is gated.
        ValueError: The model is of another class, or the exact score does not cover the prompt.
    """
    if config.model == "exact":
        # Imported here because only this yardstick needs the built-in world.
        from picardopt_3d.guidance.exact_score import exact_score_of

        return exact_score_of(prompt, size)
    given: dict[str, Any] = {} if config.source is None else {"source": _source(config.source)}
    # Imported by name and only here: diffusers takes seconds to import, and the exact score does without.
    loader = named(GUIDANCE_MODELS[config.model].loader)
    score: ScoreModel = loader.from_pretrained(**given, device=device, options=config.options)
    return score


def check_source(config: GuidanceConfig) -> None:
    """Checks that the model of a guidance is there, without loading it: its folder, or the hub, has its index.

    Args:
        config: The options.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: The pipeline is of another class.
    """
    known = GUIDANCE_MODELS.get(config.model)
    if known is not None and config.source is not None:
        read_index(_source(config.source), known.classes, config.options)


def _source(source: str) -> str:
    """Returns the path of a folder ("~" expanded) if it exists, else the hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source
