"""Score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt import batched
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.joinable import JoinableScore, draw_for, with_gradient
from picardopt_3d.guidance.loss_config import WEIGHTINGS, GuidanceForm, SdsConfig
from picardopt_3d.guidance.protocol import Encoded, Guidance, Prediction, ScoreModel
from picardopt_3d.prompts import ImagePrompt, TextPrompt


class ScoreDistillation(Guidance):
    """The SDS loss over any score model.

    Args:
        score: The score model.
        config: Options of the loss.
    """

    def __init__(self, score: ScoreModel, config: SdsConfig | None = None) -> None:
        self.score = score
        self.config = config or SdsConfig()
        self.size = score.size

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        """Encodes a prompt with the score model."""
        return self.score.encode(prompt)

    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """Returns a loss whose gradient by the views in the model's space is `w(t) (eps_hat - eps) / batch`.

        Every view has its own noise level, uniform over the range. Random numbers come from torch's global CPU
        generator, in this order: those of `to_model_space`, the noise levels, the noise.

        Args:
            views: Rendered RGB in [0, 1], with a gradient, `[batch, 3, height, width]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level, as fractions of the schedule.

        Returns:
            Half the squared length of that gradient, summed over pixels and averaged over the batch. The value measures
            how much the score model would change the views; it does not fall to zero, because the noise differs in
            every step.

        Raises:
            ValueError: The shapes disagree, or the range is empty or outside [0, 1].
        """
        check_views(views, cameras)
        score, options = self.score, {"prompt": prompt, "config": self.config}
        if not isinstance(score, JoinableScore):
            clean = score.to_model_space(views)
            draws = draw_noise(clean.shape, views.device, timestep_range, len(score.alphas_cumprod))
            with torch.no_grad():
                gradient = gradient_of(clean, *draws, cameras, score=score, **options)
            return loss_with_gradient(clean, gradient)
        drawn, shape = draw_for(score, views), (len(views), *score.space)
        draws = draw_noise(shape, views.device, timestep_range, len(score.alphas_cumprod))
        share = torch.full((len(views),), 1 / len(views), device=views.device)
        gradient, change = gradient_of_views(
            views.detach(), drawn, *draws, share, cameras, score=score, **options
        )
        return with_gradient(views, gradient, 0.5 * change.square().sum() / len(views))


@batched
def gradient_of_views(
    views: Tensor,
    drawn: tuple[Tensor, ...],
    timesteps: Tensor,
    noise: Tensor,
    share: Tensor,
    cameras: Cameras,
    *,
    score: JoinableScore,
    prompt: Encoded,
    config: SdsConfig,
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of score distillation by views, through the VAE of a latent model; no row needs another.

    Args:
        views: RGB in [0, 1], `[batch, 3, height, width]`.
        drawn: From `draw_for`.
        timesteps: Noise levels, `[batch]`.
        noise: Of the model's space, `[batch, channels, ...]`.
        share: What each view counts in the mean over its own step's views, `[batch]`.
        cameras: The cameras of the views.
        score: The score model.
        prompt: From its `encode`.
        config: Options of the loss.

    Returns:
        The gradient by the views, times their share, and the gradient in the model's space, without it.
    """
    with torch.enable_grad():
        leaf = views.detach().requires_grad_()
        clean = score.to_model_space(leaf, *drawn)
    there = clean.detach()
    # The gradient of half the squared distance from a target that stands still, to the last bit.
    change = there - (
        there
        - gradient_of(there, timesteps, noise, cameras, score=score, prompt=prompt, config=config)
    )
    (gradient,) = torch.autograd.grad(clean, leaf, share.view(-1, 1, 1, 1) * change)
    return gradient, change


def gradient_of(
    clean: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    cameras: Cameras,
    *,
    score: ScoreModel,
    prompt: Encoded,
    config: SdsConfig,
) -> Tensor:
    """Returns the gradient `w(t) (eps_hat - eps)`, clipped, of each view in the model's space.

    Args:
        clean: Views in the model's space, `[batch, channels, ...]`.
        timesteps: See `gradient_of_views`, as for all that follow.
        noise: Likewise.
        cameras: Likewise.
        score: Likewise.
        prompt: Likewise.
        config: Likewise.
    """
    abar = abar_at(score, timesteps)
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    predicted = score.predict_noise(noisy, timesteps, prompt, cameras)
    guided = guided_noise(predicted, config.guidance_scale, config.guidance_form)
    gradient = WEIGHTINGS[config.weighting](abar) * (guided - noise)
    return clip_gradient(gradient, config.clip_value, config.clip_norm)


def guided_noise(predicted: Prediction, scale: float, form: GuidanceForm = "uncond") -> Tensor:
    """Applies classifier-free guidance by either published formula, with Perp-Neg if there are negatives.

    Perp-Neg (arXiv 2304.04968, equation 6) uses of each negative direction only the part that is perpendicular to the
    prompt's direction.

    Args:
        predicted: Predictions of a score model.
        scale: Strength `s` of the guidance.
        form: See `SdsConfig.guidance_form`.

    Returns:
        The guided noise, `[batch, channels, height, width]`.
    """
    conditional, unconditional = predicted.conditional, predicted.unconditional
    direction = ahead = conditional - unconditional
    if predicted.negatives is not None and predicted.weights is not None:
        for negative, weight in zip(predicted.negatives, predicted.weights, strict=True):
            aside = _perpendicular(negative - unconditional, ahead)
            direction = direction + weight[:, None, None, None].to(aside) * aside
    return (unconditional if form == "uncond" else conditional) + scale * direction


def _perpendicular(vectors: Tensor, to: Tensor) -> Tensor:
    """Returns each view's vector without its component along another vector, `[batch, ...]`."""
    over = tuple(range(1, vectors.ndim))
    along = (vectors * to).sum(over, keepdim=True) / to.square().sum(over, keepdim=True).clamp(
        min=1e-6
    )
    return vectors - along * to


def clip_gradient(gradient: Tensor, value: float | None, norm: float | None) -> Tensor:
    """Limits the entries of a gradient, then its length for each view.

    A gradient that is not finite stays so, so that the optimizer can detect it.

    Args:
        gradient: Gradient of each view, `[batch, ...]`.
        value: Largest magnitude of an entry, or None.
        norm: Largest length of one view's gradient, or None.
    """
    if value is not None:
        gradient = gradient.clamp(-value, value)
    if norm is not None:
        lengths = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        gradient = gradient * (norm / lengths).clamp(max=1).view(-1, *[1] * (gradient.ndim - 1))
    return gradient


def loss_with_gradient(clean: Tensor, gradient: Tensor) -> Tensor:
    """Returns a scalar whose gradient by `clean` is `gradient / batch`.

    Its value is half the squared length of the gradient, averaged over the batch.
    """
    target = (clean - gradient).detach()
    return 0.5 * (clean - target).square().sum() / len(clean)


def abar_at(score: ScoreModel, timesteps: Tensor) -> Tensor:
    """Returns the schedule's abar at some noise levels, `[batch, 1, 1, 1]`."""
    return score.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]


def draw_noise(
    shape: Sequence[int], device: torch.device, timestep_range: tuple[float, float], count: int
) -> tuple[Tensor, Tensor]:
    """Draws a noise level for each view and then the noise, on the CPU so that all devices get the same.

    Args:
        shape: Of the views in the model's space, `[batch, channels, height, width]`.
        device: Device of the result.
        timestep_range: Smallest and largest noise level, as fractions of the schedule.
        count: Number of noise levels in the schedule.

    Returns:
        Timesteps, `[batch]`, and noise, float32, `[batch, channels, height, width]`.
    """
    timesteps = draw_timesteps(shape[0], timestep_range, count)
    return timesteps.to(device), draw_normal(shape, device)


def draw_normal(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draws normal noise, float32, on the CPU so that all devices get the same."""
    return torch.randn(*shape, dtype=torch.float32).to(device)


def draw_timesteps(batch: int, timestep_range: tuple[float, float], count: int) -> Tensor:
    """Draws uniform integer noise levels from torch's global CPU generator.

    Args:
        batch: Number of noise levels to draw.
        timestep_range: Smallest and largest noise level, inclusive, as fractions of the schedule.
        count: Number of noise levels in the schedule.

    Returns:
        Timesteps between 0 and count - 1, `[batch]`.

    Raises:
        ValueError: The range is empty or outside [0, 1].
    """
    check_range(timestep_range)
    low = min(count - 1, round(timestep_range[0] * count))
    high = min(count - 1, round(timestep_range[1] * count))
    return torch.randint(low, high + 1, (batch,))


def check_range(timestep_range: tuple[float, float]) -> None:
    """Checks a range of noise levels.

    Raises:
        ValueError: The range is empty or outside [0, 1].
    """
    if not 0 <= timestep_range[0] <= timestep_range[1] <= 1:
        raise ValueError(
            f"timestep_range={timestep_range!r}: give (low, high) with 0 <= low <= high <= 1"
        )


def check_views(views: Tensor, cameras: Cameras) -> None:
    """Checks that there is one view per camera.

    Raises:
        ValueError: The shapes disagree.
    """
    if views.ndim != 4 or views.shape[1] != 3 or len(cameras) != len(views):
        raise ValueError(
            f"views of shape {tuple(views.shape)} for {len(cameras)} cameras: give "
            f"[{len(cameras)}, 3, height, width], one view per camera"
        )
