"""How scores become gradients: the numbers of the losses, light to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

GuidanceForm = Literal["uncond", "cond"]
Weighting = Literal["sds", "uniform", "fantasia3d"]
Lora = Literal["inside", "paper"]

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "sds": lambda abar: 1 - abar,
    "uniform": torch.ones_like,
    "fantasia3d": lambda abar: abar.sqrt() * (1 - abar),
}
"""`w(t)` as a function of abar."""


@dataclass(frozen=True)
class SdsConfig:
    """How scores become a gradient.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance.
        guidance_form: "uncond" is the usual `uncond + s (cond - uncond)`, the default; "cond" is
            `cond + s (cond - uncond)`, DreamFusion's and threestudio's for text models, which is the first with s + 1.
            With Perp-Neg its directions join `cond - uncond` in the parentheses; published is "uncond".
        weighting: `w(t)`: "sds" is `1 - abar`, "uniform" is 1, "fantasia3d" is `sqrt(abar) (1 - abar)`.
        clip_value: Largest magnitude of an entry of the gradient in the model's space, before it goes back through the
            resizing or the VAE; None leaves it. (threestudio's `grad_clip`.)
        clip_norm: Largest length of that gradient of one view, in the same place; None leaves it.
    """

    guidance_scale: float = 7.5
    guidance_form: GuidanceForm = "uncond"
    weighting: Weighting = "sds"
    clip_value: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Checks the names and limits.

        Raises:
            ValueError: A name is unknown, or a limit is not positive.
        """
        _check_names(self)
        for name in ("clip_value", "clip_norm"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}={limit}: give a positive number, or None")


@dataclass(frozen=True)
class VsdConfig:
    """How scores become gradients of the scene and of the LoRA.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance of the pretrained score.
        guidance_form: As `SdsConfig.guidance_form`; ProlificDreamer's is "uncond".
        lora_guidance_scale: The same of the LoRA's score, in the form "uncond"; at 1 it is the conditional score
            alone.
        weighting: `w(t)` of the scene's gradient, as `SdsConfig.weighting`.
        lora: "inside": the LoRA's optimizer is stepped with the scene's, and VSD is exact at tolerance 0. "paper": each
            process trains a LoRA of its own at every evaluation, also at those that are thrown away: never exact, a run
            depends on the number of processes and the window. For comparisons from Python only.
        rank: The LoRA's rank.
        learning_rate: Of the LoRA's AdamW (betas 0.9 and 0.99, eps 1e-15).
        drop_camera: Chance that the LoRA is not told a view's camera while it learns.
        clip_value: As `SdsConfig.clip_value`.
        clip_norm: As `SdsConfig.clip_norm`.
        seed: Of the LoRA's first weights.
    """

    guidance_scale: float = 7.5
    guidance_form: GuidanceForm = "uncond"
    lora_guidance_scale: float = 1.0
    weighting: Weighting = "sds"
    lora: Lora = "inside"
    rank: int = 4
    learning_rate: float = 1e-4
    drop_camera: float = 0.1
    clip_value: float | None = None
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks names and numbers.

        Raises:
            ValueError: One is unknown or out of range.
        """
        _check_names(self)
        if self.lora not in get_args(Lora):
            raise ValueError(f"lora={self.lora!r}: give one of {', '.join(get_args(Lora))}")
        for name in ("rank", "learning_rate", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        if not 0 <= self.drop_camera <= 1:
            raise ValueError(f"drop_camera={self.drop_camera}: give a chance from 0 to 1")


def _check_names(config: SdsConfig | VsdConfig) -> None:
    """Checks the names that both have."""
    for name, known in (
        ("guidance_form", get_args(GuidanceForm)),
        ("weighting", tuple(WEIGHTINGS)),
    ):
        if getattr(config, name) not in known:
            raise ValueError(f"{name}={getattr(config, name)!r}: give one of {', '.join(known)}")
