"""The options of the losses that turn scores into gradients; this module is fast to import."""

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
"""The weight `w(t)` as a function of abar."""


@dataclass(frozen=True)
class SdsConfig:
    """Options of score distillation.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance.
        guidance_form: "uncond" is the usual `uncond + s (cond - uncond)`, the default; "cond" is
            `cond + s (cond - uncond)`, as in DreamFusion and threestudio's text models, which equals the first form
            with s + 1. Perp-Neg's directions are added inside the parentheses; it was published with "uncond".
        weighting: `w(t)`: "sds" is `1 - abar`, "uniform" is 1, "fantasia3d" is `sqrt(abar) (1 - abar)`.
        clip_value: Largest magnitude of an entry of the gradient in the model's space, before it goes back through the
            resizing or the VAE; None does not clip (threestudio's `grad_clip`).
        clip_norm: Largest length of one view's gradient, also in the model's space; None does not clip.
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
    """Options of variational score distillation.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance of the pretrained score.
        guidance_form: As `SdsConfig.guidance_form`; ProlificDreamer's is "uncond".
        lora_guidance_scale: Strength `s` for the LoRA's score, in the form "uncond"; 1 leaves the conditional score
            alone.
        weighting: `w(t)` of the scene's gradient, as `SdsConfig.weighting`.
        lora: "inside" steps the LoRA's optimizer with the scene's, so that VSD is exact at tolerance 0. With "paper"
            each process trains a LoRA of its own at every evaluation, even at discarded ones: it is never exact, and a
            run depends on the number of processes and the window; a resumed run gives all of them the first process's
            LoRA. For comparisons.
        rank: Rank of the LoRA.
        learning_rate: Learning rate of the LoRA's AdamW (betas 0.9 and 0.99, eps 1e-15).
        drop_camera: Probability that a view's camera is hidden from the LoRA in training.
        clip_value: As `SdsConfig.clip_value`.
        clip_norm: As `SdsConfig.clip_norm`.
        seed: Seed of the LoRA's initial weights.
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
        """Checks names and values.

        Raises:
            ValueError: A name is unknown or a value is out of range.
        """
        _check_names(self)
        if self.lora not in get_args(Lora):
            raise ValueError(f"lora={self.lora!r}: give one of {', '.join(get_args(Lora))}")
        for name in ("rank", "learning_rate", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        if not 0 <= self.drop_camera <= 1:
            raise ValueError(f"drop_camera={self.drop_camera}: give a probability from 0 to 1")

    @property
    def caution(self) -> str | None:
        """What a user must know of a run with these options, in one line; None: nothing."""
        if self.lora == "inside":
            return None
        return (
            "vsd.lora='paper': each worker trains a LoRA of its own at every evaluation, discarded ones too, so that "
            "the run depends on --workers and --window and is the sequential run at no tolerance, not even at 0; "
            "'inside', the default, is exact"
        )


@dataclass(frozen=True)
class DenoiseConfig:
    """Options of image-to-image denoising; its noise level is the stage's.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance.
        guidance_form: As `SdsConfig.guidance_form`; DreamGaussian's is "uncond".
        steps: Steps that DDIM would take from pure noise on; a view takes the last ones, as many as its level needs.
            Give a divisor of the model's number of noise levels (often 1000): others do not reach its largest level.
    """

    guidance_scale: float = 7.5
    guidance_form: GuidanceForm = "uncond"
    steps: int = 50

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: The form is unknown, or there is no step.
        """
        _check_names(self)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a whole number of at least 1")


def _check_names(config: SdsConfig | VsdConfig | DenoiseConfig) -> None:
    """Checks the names that the configurations share."""
    for name, known in (
        ("guidance_form", get_args(GuidanceForm)),
        ("weighting", tuple(WEIGHTINGS)),
    ):
        given = getattr(config, name, None)
        if given is not None and given not in known:
            raise ValueError(f"{name}={given!r}: give one of {', '.join(known)}")
