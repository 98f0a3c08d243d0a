"""The exact score of finitely many views in closed form: guidance without a network.

If a clean view is one of `v[i]` with probability `p[i]`, then given its noisy version the view's mean is
`sum_i w[i] v[i]` with `w[i]` proportional to `p[i] exp(-|noisy - sqrt(abar) v[i]|^2 / (2 (1 - abar)))`. A
perfectly trained diffusion model would predict exactly the noise that this mean implies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.protocol import (
    Encoded,
    EncodedText,
    Prediction,
    as_encoded_text,
    as_text_prompt,
    model_space_to_pixels,
    pixels_to_model_space,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.world import (
    COLOURS,
    Subject,
    all_subjects,
    colourize,
    parse_prompt,
    render_shading,
)

LEVELS = 1000
"""Noise levels of the schedule, as the models that ship have."""


class Candidates(NamedTuple):
    """The views that a camera could see.

    Attributes:
        views: RGB in [-1, 1], `[batch or 1, candidates, 3, size, size]`.
        log_prior: Logarithm of their prior probabilities, up to a constant, `[batch, candidates]`.
    """

    views: Tensor
    log_prior: Tensor


class ViewSet(Protocol):
    """A finite set of candidate views for every camera.

    Attributes:
        captions: Caption of each candidate.
        size: Pixels along a side.
    """

    captions: Sequence[str]
    size: int

    def candidates(self, cameras: Cameras) -> Candidates:
        """Returns the candidates for each camera, in the order of `captions`."""
        ...


class RenderedSubjects:
    """Subjects of the built-in world, rendered from exactly the requested camera; a `ViewSet`.

    Args:
        subjects: The subjects, all equally probable; by default all of the world's.
        size: Pixels along a side.
    """

    def __init__(self, subjects: Sequence[Subject] | None = None, size: int = 32) -> None:
        self.subjects = all_subjects() if subjects is None else tuple(subjects)
        if not self.subjects:
            raise ValueError("subjects=(): give at least one subject")
        self.captions: Sequence[str] = [subject.caption for subject in self.subjects]
        self.size = size

    def candidates(self, cameras: Cameras) -> Candidates:
        """Returns one view per subject and camera."""
        shaded = {
            shape: render_shading(shape, cameras, self.size, self.size)
            for shape in dict.fromkeys(subject.shape for subject in self.subjects)
        }
        views = [
            colourize(shaded[subject.shape], torch.tensor(COLOURS[subject.colour]))
            for subject in self.subjects
        ]
        return Candidates(
            2 * torch.stack(views, dim=1) - 1, torch.zeros(len(cameras), len(self.subjects))
        )


class KnownViews:
    """Given views with their cameras; a `ViewSet`.

    For another camera, a view's prior is a normal distribution of the angle between the two lines of sight.

    Args:
        views: RGB in [0, 1], `[views, 3, size, size]`.
        cameras: Cameras of the views.
        captions: Captions of the views.
        bandwidth: Standard deviation of the angle, degrees.
    """

    def __init__(
        self, views: Tensor, cameras: Cameras, captions: Sequence[str], bandwidth: float = 10.0
    ) -> None:
        if not len(views) == len(cameras) == len(captions) > 0:
            raise ValueError(
                f"{len(views)} views, {len(cameras)} cameras and {len(captions)} captions: give one of each per view"
            )
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth}: give a positive angle in degrees")
        self.captions: Sequence[str] = list(captions)
        self.size = views.shape[-1]
        self._views = (2 * views - 1)[None]
        self._sight = torch.nn.functional.normalize(cameras.position, dim=-1)
        self._bandwidth = math.radians(bandwidth)

    def candidates(self, cameras: Cameras) -> Candidates:
        """Returns all views with priors that fall with the angle to the camera."""
        sight = torch.nn.functional.normalize(cameras.position, dim=-1)
        angle = torch.acos((sight @ self._sight.T).clamp(-1, 1))
        return Candidates(self._views, -(angle**2) / (2 * self._bandwidth**2))


class ExactScore:
    """The exact score of a finite set of views; a `JoinableScore`.

    A prompt selects the candidates whose caption names the same subject (or is the same text); the empty prompt selects
    all of them.

    Args:
        view_set: The views; by default the whole built-in world, from exactly the requested camera.
        timesteps: Number of noise levels of the schedule (cosine, like that of the shipped model).
    """

    def __init__(self, view_set: ViewSet | None = None, timesteps: int = LEVELS) -> None:
        self.view_set: ViewSet = view_set or RenderedSubjects()
        self.size = self.view_set.size
        self.space, self.joined_views = (3, self.size, self.size), 64
        self.alphas_cumprod = cosine_schedule(timesteps)

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        """Selects the candidates of a prompt, `[1, candidates]`; its encoding is a mask.

        View-dependent texts make no difference, because the candidates are those of the actual camera.

        Raises:
            ValueError: No candidate matches the prompt, or the prompt asks for Perp-Neg.
            TypeError: The prompt is an image.
        """
        asked = as_text_prompt(prompt)
        if asked.perp_neg is not None:
            raise ValueError(
                "perp_neg: the exact score uses the cameras themselves; leave perp_neg out"
            )
        return EncodedText(
            asked, self._select(asked.text)[None], self._select(asked.negative)[None]
        )

    def draw(self, batch: int) -> Tensor | None:
        """Returns None: pixels need no random numbers."""
        return None

    def to_model_space(self, views: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Returns the views as pixels in [-1, 1], resized, `[batch, 3, size, size]`."""
        return pixels_to_model_space(views, self.size)

    def to_views(self, clean: Tensor) -> Tensor:
        """Returns pixels in [-1, 1] as RGB clamped to [0, 1], `[batch, 3, size, size]`."""
        return model_space_to_pixels(clean)

    def _select(self, text: str) -> Tensor:
        captions = self.view_set.captions
        if not text:
            return torch.ones(len(captions), dtype=torch.bool)
        subject = parse_prompt(text)
        mask = torch.tensor(
            [
                caption == text or (subject is not None and parse_prompt(caption) == subject)
                for caption in captions
            ]
        )
        if not mask.any():
            raise ValueError(
                f"prompt={text!r}: this exact score covers only {', '.join(sorted(set(captions)))}; ask for one of them"
            )
        return mask

    @torch.no_grad()
    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """Returns the noise that the posterior mean implies, with and without the prompt.

        Args:
            noisy: Noisy views, `[batch, 3, size, size]`.
            timesteps: Integer noise levels, `[batch]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
        """
        asked = as_encoded_text(prompt)
        abar = self.alphas_cumprod[timesteps.cpu()]
        views, log_prior = self.view_set.candidates(cameras.to("cpu"))
        views, log_prior = views.to(noisy), log_prior.to(noisy)
        abar = abar.to(noisy)[:, None]  # [batch, 1]
        away = noisy[:, None] - abar.sqrt()[..., None, None, None] * views
        squared = away.flatten(2).square().sum(-1, dtype=torch.float64)  # [batch, candidates]
        logits = log_prior - squared / (2 * (1 - abar))

        def noise(mask: Tensor) -> Tensor:
            weights = (
                logits.masked_fill(~mask.to(noisy.device), -math.inf).softmax(-1).to(noisy.dtype)
            )
            mean = torch.einsum("bn,bnchw->bchw", weights, views.expand(len(noisy), -1, -1, -1, -1))
            alpha = abar[..., None, None]
            return (noisy - alpha.sqrt() * mean) / (1 - alpha).sqrt()

        return Prediction(noise(asked.conditional), noise(asked.unconditional))


def exact_score_of(prompt: str | TextPrompt | ImagePrompt, size: int) -> ExactScore:
    """Builds the exact score of a prompt's shape in every colour, so that guidance has an unconditional score.

    Args:
        prompt: A text that names an object of the built-in world.
        size: Pixels along a side of the views.

    Raises:
        ValueError: The prompt names no such object.
    """
    text = "a picture" if isinstance(prompt, ImagePrompt) else as_text_prompt(prompt).text
    subject = parse_prompt(text)
    if subject is None:
        raise ValueError(
            f"prompt={text!r}: the exact guidance covers only the "
            'built-in shapes and colours; ask for one of those, e.g. "a red cube", or use another guidance model'
        )
    known = [Subject(subject.shape, colour) for colour in COLOURS]
    return ExactScore(RenderedSubjects(known, size))


def cosine_schedule(timesteps: int) -> Tensor:
    """Returns abar of the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, equation 17), `[timesteps]`."""
    ends = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    signal = torch.cos((ends + 0.008) / 1.008 * math.pi / 2).square()
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0).float()
