"""Score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.protocol import NoisePair, Prompt, ScoreModel


@dataclass(frozen=True)
class SdsConfig:
    """How scores become a gradient.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance.
        guidance_form: "uncond" is the usual `uncond + s (cond - uncond)`, the default; "cond" is
            `cond + s (cond - uncond)`, DreamFusion's and threestudio's for text models, which is the first with s + 1.
        weighting: `w(t)`: "sds" is `1 - abar`, "uniform" is 1.
    """

    guidance_scale: float = 7.5
    guidance_form: Literal["uncond", "cond"] = "uncond"
    weighting: Literal["sds", "uniform"] = "sds"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: A name is unknown.
        """
        for name, known in (
            ("guidance_form", ("uncond", "cond")),
            ("weighting", ("sds", "uniform")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")


class ScoreDistillation:
    """The SDS loss over any score model; a `Guidance`.

    Args:
        score: The score model.
        config: How its scores become a gradient.
    """

    def __init__(self, score: ScoreModel, config: SdsConfig | None = None) -> None:
        self.score = score
        self.config = config or SdsConfig()
        self.size = score.size

    def encode(self, prompt: str, negative: str = "") -> Prompt:
        """Encode a prompt with the score model."""
        return self.score.encode(prompt, negative)

    def __call__(
        self,
        views: Tensor,
        prompt: Prompt,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """A loss whose gradient with respect to `x = 2 views - 1` is `w(t) (eps_hat - eps) / batch`.

        Every view has its own noise level, uniform over the range. The noise levels and then the noise are drawn from
        torch's global CPU generator.

        Args:
            views: Rendered RGB in [0, 1], with a gradient. [batch, 3, height, width]
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level, as fractions of the schedule.

        Returns:
            Half the squared length of that gradient, summed over pixels and averaged over the batch. (Its value tells
            how far the score model is from content; it does not fall to zero, as the noise differs every step.)

        Raises:
            ValueError: The shapes disagree, or the range is empty or outside of 0 to 1.
        """
        self._check(views, cameras, timestep_range)
        clean = 2 * views - 1
        if views.shape[-2:] != (self.size, self.size):
            clean = functional.interpolate(
                clean, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            )
        timesteps = draw_timesteps(len(views), timestep_range, len(self.score.alphas_cumprod)).to(
            views.device
        )
        noise = torch.randn(clean.shape, dtype=clean.dtype).to(views.device)
        with torch.no_grad():
            abar = self.score.alphas_cumprod.to(clean)[timesteps][:, None, None, None]
            noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
            predicted = self.score.predict_noise(noisy, timesteps, prompt, cameras)
            weight = 1 - abar if self.config.weighting == "sds" else torch.ones_like(abar)
            gradient = weight * (self.guide(predicted) - noise)
            target = clean - gradient
        return 0.5 * (clean - target).square().sum() / len(views)

    def guide(self, predicted: NoisePair) -> Tensor:
        """Classifier-free guidance. [batch, 3, height, width]."""
        conditional, unconditional = predicted
        base = unconditional if self.config.guidance_form == "uncond" else conditional
        return base + self.config.guidance_scale * (conditional - unconditional)

    def _check(self, views: Tensor, cameras: Cameras, timestep_range: tuple[float, float]) -> None:
        if views.ndim != 4 or views.shape[1] != 3 or len(cameras) != len(views):
            raise ValueError(
                f"views of shape {tuple(views.shape)} for {len(cameras)} cameras: give "
                f"[{len(cameras)}, 3, height, width], one view per camera"
            )
        low, high = timestep_range
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"timestep_range={timestep_range!r}: give (low, high) with 0 <= low <= high <= 1"
            )


def draw_timesteps(batch: int, timestep_range: tuple[float, float], count: int) -> Tensor:
    """Uniform integer noise levels from torch's global CPU generator.

    Args:
        batch: How many.
        timestep_range: Smallest and largest, as fractions of the schedule; both ends can be drawn.
        count: Noise levels in the schedule.

    Returns:
        [batch], between 0 and count - 1.
    """
    low = min(count - 1, round(timestep_range[0] * count))
    high = min(count - 1, round(timestep_range[1] * count))
    return torch.randint(low, high + 1, (batch,))
