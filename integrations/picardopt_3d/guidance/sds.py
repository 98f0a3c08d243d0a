"""Score distillation sampling (DreamFusion, arXiv 2209.14988, equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from picardopt import batched
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.draws import check_views, draw_noise
from picardopt_3d.guidance.joinable import (
    JoinableScore,
    draw_for,
    in_parts,
    joined_if_shared,
    most_at_once,
    with_gradient,
)
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
        self._gradient_of_views = batched(gradient_of_views)

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
        score, device = self.score, views.device
        levels = len(score.alphas_cumprod)
        if not isinstance(score, JoinableScore):
            clean = score.to_model_space(views)
            draws = draw_noise(clean.shape, device, timestep_range, levels)
            with torch.no_grad():
                gradient = gradient_of(clean, *draws, cameras, score, prompt, self.config)
            return loss_with_gradient(clean, gradient)
        drawn, shape = draw_for(score, views), (len(views), *score.space)
        draws = draw_noise(shape, device, timestep_range, levels)
        share = torch.full((len(views),), 1 / len(views), device=device)
        call = joined_if_shared(self._gradient_of_views, score, len(views))
        gradient, change = call(
            views.detach(),
            drawn,
            *draws,
            share,
            cameras,
            score=score,
            prompt=prompt,
            config=self.config,
            at_once=most_at_once(score, len(views)),
        )
        return with_gradient(views, gradient, 0.5 * change.square().sum() / len(views))


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
    at_once: int,
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
        at_once: Most views of one pass.

    Returns:
        The gradient by the views, times their share, and the gradient in the model's space, without it.
    """
    gradients, changes = [], []
    for each in in_parts(at_once, views, drawn, timesteps, noise, share, cameras):
        some, numbers, levels, noises, shares, seen = each
        with torch.enable_grad():
            leaf = some.detach().requires_grad_()
            clean = score.to_model_space(leaf, *numbers)
        there = clean.detach()
        target = there - gradient_of(there, levels, noises, seen, score, prompt, config)
        changes.append(there - target)  # as `loss_with_gradient` takes it, to the last bit
        gradients += torch.autograd.grad(clean, leaf, shares.view(-1, 1, 1, 1) * changes[-1])
    return torch.cat(gradients), torch.cat(changes)


def gradient_of(
    clean: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    cameras: Cameras,
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
