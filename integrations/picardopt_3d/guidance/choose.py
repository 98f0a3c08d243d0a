"""The choice of the score model and the loss of a run, by options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch

from picardopt_3d.guidance.loading import ModelOptions, noise_levels, read_index
from picardopt_3d.guidance.loss_config import DenoiseConfig, SdsConfig, VsdConfig
from picardopt_3d.guidance.protocol import Guidance, ScoreModel
from picardopt_3d.guidance.sds import ScoreDistillation
from picardopt_3d.models import GUIDANCE_MODELS, named
from picardopt_3d.prompts import ImagePrompt, PerpNeg, TextPrompt, ViewWords

Model = Literal["pixel-diffusion", "stable-diffusion", "deepfloyd", "zero123", "exact"]

Loss = Literal["sds", "vsd", "denoise"]


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
        perp_neg: Perp-Neg, which pushes away from the texts of neighbouring views; needs `views`.
        loss: "sds" (score distillation), "vsd" (variational score distillation, which trains a LoRA of the model
            beside the scene; only for models that take a text) or "denoise" (the squared difference from views that
            the model has refined).
        lora_source: The model of the same kind that VSD adds its LoRA to, a folder or a hub id (ProlificDreamer has
            Stable Diffusion 2.1 beside 2.1 base); None: to the model itself.
    """

    model: Model = "pixel-diffusion"
    source: str | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    negative: str = ""
    views: ViewWords | None = None
    perp_neg: PerpNeg | None = None
    loss: Loss = "sds"
    lora_source: str | None = None

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
        if self.lora_source is not None and self.loss != "vsd":
            raise ValueError(
                f"lora_source={self.lora_source!r} with loss={self.loss!r}: only VSD has a LoRA; leave it out, or "
                "give loss 'vsd'"
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
    denoise: DenoiseConfig | None = None,
) -> Guidance:
    """Loads the guidance that the options name.

    Guidances of the same model share its network, so that a recipe's stages hold it in memory once. A network that VSD
    adds its LoRA to is its own: with a `lora_source` that is the second one, and the first is shared.

    Args:
        config: The score model and the loss.
        prompt: See `load_score`.
        size: See `load_score`.
        device: See `load_score`.
        sds: Options of score distillation.
        vsd: Options of variational score distillation.
        denoise: Options of image-to-image denoising.

    Raises:
        FileNotFoundError: See `load_score`.
        PermissionError: See `load_score`.
        ValueError: See `load_score`; or VSD cannot train a LoRA of this model, or it has too few noise levels to
            denoise.
    """
    if config.loss == "vsd":
        return _load_vsd(config, prompt, size, device, vsd)
    shared = _load_shared(config, prompt, size, device)
    if config.loss == "denoise":
        # Imported here because it imports diffusers.
        from picardopt_3d.guidance.denoise import Denoising

        return Denoising(shared, denoise)
    return ScoreDistillation(shared, sds)


def _load_vsd(
    config: GuidanceConfig,
    prompt: str | TextPrompt | ImagePrompt,
    size: int,
    device: torch.device | str,
    vsd: VsdConfig | None,
) -> Guidance:
    """Loads one network, or two where the LoRA has a source of its own; see `load_guidance`."""
    # Imported here because few runs need it.
    from picardopt_3d.guidance.vsd import VSD

    if config.lora_source in (None, config.source):
        own: Any = load_score(config, prompt, size, device)
        return VSD(own, vsd)
    score: Any = _load_shared(config, prompt, size, device)
    # What is trained cannot be offloaded; the other network can.
    options = replace(config.options, offload="none")
    trained = replace(config, source=config.lora_source, lora_source=None, options=options)
    lora_score: Any = load_score(trained, prompt, size, device)
    if hasattr(lora_score, "vae"):
        lora_score.vae = score.vae  # the LoRA learns from the other model's latents
    return VSD(score, vsd, lora_score)


def _load_shared(
    config: GuidanceConfig,
    prompt: str | TextPrompt | ImagePrompt,
    size: int,
    device: torch.device | str,
) -> ScoreModel:
    """Loads a score model that nothing changes, or returns the one in use."""
    key: tuple[object, ...] = (config.model, config.source, config.options, str(device))
    if config.model == "exact":
        key += (str(prompt), size)
    shared: ScoreModel | None = _SHARED.get(key)
    if shared is None:
        shared = _SHARED[key] = load_score(config, prompt, size, device)
    return shared


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
    """Checks that the models of a guidance are there, without loading them: folders, or the hub, have their indices.

    Args:
        config: The options.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: The pipeline is of another class.
    """
    known = GUIDANCE_MODELS.get(config.model)
    for source in (config.source, config.lora_source):
        if known is not None and source is not None:
            read_index(_source(source), known.classes, config.options)


def check_denoising(config: GuidanceConfig, denoise: DenoiseConfig) -> None:
    """Checks that a score model has as many noise levels as denoising takes steps, without loading it.

    Args:
        config: The score model and the loss.
        denoise: Options of image-to-image denoising.

    Raises:
        ValueError: There are more steps than noise levels.
        FileNotFoundError: See `noise_levels`.
        PermissionError: See `noise_levels`.
    """
    if config.loss != "denoise":
        return
    # Imported here because it imports diffusers.
    from picardopt_3d.guidance.denoise import check_steps

    known = GUIDANCE_MODELS.get(config.model)
    if known is None:
        from picardopt_3d.guidance.exact_score import LEVELS

        levels = LEVELS
    else:
        source: Any = known.shipped if config.source is None else _source(config.source)
        levels = noise_levels(source, config.options)
    check_steps(denoise.steps, levels)


def _source(source: str) -> str:
    """Returns the path of a folder ("~" expanded) if it exists, else the hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source
