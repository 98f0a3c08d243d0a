"""Image-to-image denoising (SDEdit, arXiv 2108.01073), and the squared difference from its result.

DreamGaussian's second stage: noise is added to a rendered view, a diffusion model takes it away again, and the view is
pulled towards what came out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional

from picardopt import batched
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.draws import check_range, check_views, draw_normal
from picardopt_3d.guidance.joinable import (
    JoinableScore,
    draw_for,
    in_parts,
    joined_if_shared,
    most_at_once,
)
from picardopt_3d.guidance.loading import ModelOptions, explained
from picardopt_3d.guidance.loss_config import DenoiseConfig
from picardopt_3d.guidance.protocol import Encoded, Guidance, ScoreModel
from picardopt_3d.guidance.sds import abar_at, guided_noise
from picardopt_3d.prompts import ImagePrompt, TextPrompt


class Denoising(Guidance):
    """The squared difference between views and what a score model makes of them; for any score model.

    Args:
        score: The score model.
        config: Options of the loss.

    Raises:
        ValueError: The model's schedule has fewer noise levels than the steps that are asked for.
    """

    def __init__(self, score: ScoreModel, config: DenoiseConfig | None = None) -> None:
        self.score = score
        self.config = config or DenoiseConfig()
        self.size = score.size
        self._scheduler = ddim_scheduler(score.alphas_cumprod, self.config.steps)
        self._refined_views = batched(refined_views)

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
        """Returns the mean squared difference between the views and their refinement, which has no gradient.

        Args:
            views: Rendered RGB in [0, 1], with a gradient, `[batch, 3, height, width]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: See `refine`.

        Raises:
            ValueError: See `refine`.
        """
        return functional.mse_loss(
            views.float(), self.refine(views, prompt, cameras, timestep_range)
        )

    @torch.no_grad()
    def refine(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float],
    ) -> Tensor:
        """Adds noise to views and takes it away again by DDIM's deterministic steps.

        All views begin at the same noise level. With n = `config.steps`, a fraction f stands for the last ceil(n f) of
        DDIM's n steps (at least one); their number is drawn uniformly from those of the range. It is a fraction of the
        schedule where n divides the number of noise levels. Elsewhere DDIM's steps, which are whole numbers of levels
        apart, end before the top: 600 steps over 1000 levels are one apart, and f = 1 begins at level 600.
        DreamGaussian's strength s leaves out the first int(n s) steps, which is the fraction 1 - s.

        Random numbers come from torch's global CPU generator, in this order: the number of steps, those of
        `to_model_space`, the noise.

        Args:
            views: RGB in [0, 1], `[batch, 3, height, width]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level to begin at, as fractions of the schedule.

        Returns:
            The refined views, in the size of the views, RGB in [0, 1], float32, `[batch, 3, height, width]`.

        Raises:
            ValueError: The shapes disagree, or the range is empty or outside [0, 1].
        """
        check_views(views, cameras)
        check_range(timestep_range)
        score, views = self.score, views.detach()
        counts = torch.full((len(views),), self._draw_count(timestep_range))
        if not isinstance(score, JoinableScore):
            clean = score.to_model_space(views)
            noise = draw_normal(clean.shape, views.device)
            return self.denoised(views, clean, noise, counts, prompt, cameras)
        drawn = draw_for(score, views)
        noise = draw_normal((len(views), *score.space), views.device)
        call = joined_if_shared(self._refined_views, score, len(views))
        refined: Tensor = call(
            views,
            drawn,
            noise,
            counts,
            cameras,
            denoising=self,
            prompt=prompt,
            at_once=most_at_once(score, len(views)),
        )
        return refined

    def denoised(
        self,
        views: Tensor,
        clean: Tensor,
        noise: Tensor,
        counts: Tensor,
        prompt: Encoded,
        cameras: Cameras,
    ) -> Tensor:
        """Returns views after their last steps of denoising, as many as each has; no row needs another.

        Args:
            views: For their size alone, `[batch, 3, height, width]`.
            clean: The views in the model's space, `[batch, channels, ...]`.
            noise: Of the same shape.
            counts: Steps of each view, on the CPU, `[batch]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
        """
        config, levels = self.config, self._scheduler.timesteps
        # Not the scheduler's `add_noise`, which changes the scheduler: it moves its schedule to the views' device.
        abar = abar_at(self.score, levels[len(levels) - counts]).to(clean)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        for left in range(int(counts.max()), 0, -1):
            level, rows = int(levels[-left]), torch.nonzero(counts >= left).flatten()
            part, timesteps = noisy[rows], torch.full((len(rows),), level, device=noisy.device)
            predicted = self.score.predict_noise(part, timesteps, prompt, cameras[rows])
            guided = guided_noise(predicted, config.guidance_scale, config.guidance_form)
            noisy[rows] = self._scheduler.step(guided, level, part).prev_sample
        refined = self.score.to_views(noisy)
        if refined.shape[-2:] != views.shape[-2:]:
            refined = functional.interpolate(
                refined, views.shape[-2:], mode="bilinear", align_corners=False, antialias=True
            )
        return refined

    def _draw_count(self, timestep_range: tuple[float, float]) -> int:
        """Draws the number of steps from that of the smallest to that of the largest noise level."""
        # 1e-9: 0.05 * 20 may be a little more than 1.
        low, high = (
            min(self.config.steps, max(1, math.ceil(self.config.steps * fraction - 1e-9)))
            for fraction in timestep_range
        )
        return int(torch.randint(low, high + 1, ()))


def refined_views(
    views: Tensor,
    drawn: tuple[Tensor, ...],
    noise: Tensor,
    counts: Tensor,
    cameras: Cameras,
    *,
    denoising: Denoising,
    prompt: Encoded,
    at_once: int,
) -> Tensor:
    """Returns `Denoising.denoised` of views that are not yet in the model's space; no row needs another.

    Args:
        views: RGB in [0, 1], `[batch, 3, height, width]`.
        drawn: From `draw_for`.
        noise: See `Denoising.denoised`, as for all that follow.
        counts: Likewise.
        cameras: Likewise.
        denoising: The guidance.
        prompt: From its `encode`.
        at_once: Most views of one pass.
    """
    score: Any = denoising.score
    refined = []
    for some, numbers, noises, steps, seen in in_parts(
        at_once, views, drawn, noise, counts, cameras
    ):
        clean = score.to_model_space(some, *numbers)
        refined.append(denoising.denoised(some, clean, noises, steps, prompt, seen))
    return torch.cat(refined)


def noise_levels(source: str | Path, options: ModelOptions) -> int:
    """Returns the number of noise levels of a pipeline's schedule, whose configuration alone is downloaded.

    Args:
        source: See `locate`.
        options: Revision.

    Raises:
        FileNotFoundError: The schedule is missing.
        PermissionError: The model is gated.
    """
    with explained(source):
        content = DDIMScheduler.load_config(
            source, subfolder="scheduler", revision=options.revision
        )
    return int(content.get("num_train_timesteps", 1000))


def check_steps(steps: int, levels: int) -> None:
    """Checks that a model has as many noise levels as denoising takes steps.

    Args:
        steps: Denoising steps from pure noise on.
        levels: Noise levels of the model.

    Raises:
        ValueError: There are more steps than noise levels.
    """
    if steps > levels:
        raise ValueError(
            f"denoise.steps={steps}: the model has {levels} noise levels; give at most as many"
        )


def ddim_scheduler(alphas_cumprod: Tensor, steps: int) -> DDIMScheduler:
    """Returns DDIM over a model's noise levels, set up as published for Stable Diffusion, for predicted noise.

    Args:
        alphas_cumprod: The schedule's abar, `[timesteps]`.
        steps: Denoising steps from pure noise on.

    Raises:
        ValueError: There are more steps than noise levels.
    """
    check_steps(steps, len(alphas_cumprod))
    scheduler = DDIMScheduler(
        num_train_timesteps=len(alphas_cumprod),
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
        steps_offset=1 if steps < len(alphas_cumprod) else 0,
    )
    # Its own come from betas, which would have to be taken back from these with rounding.
    scheduler.alphas_cumprod = alphas_cumprod.float().cpu()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler
