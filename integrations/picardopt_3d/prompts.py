"""Prompts: a text or an image, and the texts that belong to each view of it.

A text-to-image model draws most things from the front. View-dependent prompts (DreamFusion, arXiv 2209.14988, section
3.2) append the direction of the view to the text. Perp-Neg (arXiv 2304.04968) interpolates between those texts and
pushes away from the neighbouring ones, so that an object does not get a face on every side.

Angles are those of `cameras`: azimuth 0 is the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras

DIRECTIONS = ("front", "side", "back", "overhead")
"""The directions of a view, in the order of `ViewWords.texts`."""

FRONT, SIDE, BACK, OVERHEAD = range(len(DIRECTIONS))


@dataclass(frozen=True)
class ViewWords:
    """The texts for the four directions, and the angles where each begins.

    Attributes:
        front: The text for views from the front; "{prompt}" stands for the prompt.
        side: The same from a side.
        back: The same from behind.
        overhead: The same from above.
        front_threshold: A view is from the front if its azimuth is less than this from 0, degrees.
        back_threshold: It is from behind if its azimuth is less than this from 180, degrees.
        overhead_threshold: It is from above if its elevation is more than this, wherever it is around, degrees.
    """

    front: str = "{prompt}, front view"
    side: str = "{prompt}, side view"
    back: str = "{prompt}, back view"
    overhead: str = "{prompt}, overhead view"
    front_threshold: float = 45.0
    back_threshold: float = 45.0
    overhead_threshold: float = 60.0

    def __post_init__(self) -> None:
        """Checks the texts and the angles.

        Raises:
            ValueError: If a text has no place for the prompt, or front and back overlap.
        """
        for name in DIRECTIONS:
            if "{prompt}" not in getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: put {{prompt}} where the prompt goes"
                )
        for name in ("front_threshold", "back_threshold"):
            if not 0 <= getattr(self, name) <= 90:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give an angle from 0 to 90 degrees"
                )

    def texts(self, prompt: str) -> tuple[str, ...]:
        """Returns the text for each of `DIRECTIONS`."""
        return tuple(getattr(self, name).replace("{prompt}", prompt) for name in DIRECTIONS)

    def directions(self, cameras: Cameras) -> Tensor:
        """Returns which of `DIRECTIONS` each camera is in. [batch]."""
        away = _from_front(cameras)
        around = torch.full_like(away, SIDE, dtype=torch.int64)
        around[away < self.front_threshold] = FRONT
        around[away > 180 - self.back_threshold] = BACK
        around[cameras.elevation > self.overhead_threshold] = OVERHEAD
        return around


@dataclass(frozen=True)
class PerpNeg:
    """How hard Perp-Neg pushes away from the neighbouring directions.

    Each strength is `a exp(-b r) + c`, where r is 1 at the first direction of the pair that the view lies between and 0
    at the other one. The values are threestudio's.

    Attributes:
        front: (a, b, c) away from the front, between front and side (r: how much of a front view it is).
        side: Away from the side, between front and side (r: how much of a side view it is).
        side_behind: Away from the side, between side and back (r: how much of a side view it is).
        front_behind: Away from the front, between side and back (the same r).
    """

    front: tuple[float, float, float] = (4.0, 0.5, -2.426)
    side: tuple[float, float, float] = (4.0, 0.5, -2.426)
    side_behind: tuple[float, float, float] = (1.0, 0.5, -0.606)
    front_behind: tuple[float, float, float] = (1.0, 0.5, 0.967)


class ViewMix(NamedTuple):
    """The texts for each camera; the numbers are rows of `TextPrompt.texts`.

    Attributes:
        first: One text. [batch]
        second: Another one. [batch]
        ratio: How much of the first, the rest being the second. [batch]
        negatives: Texts to push away from. [negatives, batch]
        weights: How hard (0 or less). [negatives, batch]
    """

    first: Tensor
    second: Tensor
    ratio: Tensor
    negatives: Tensor
    weights: Tensor


@dataclass(frozen=True)
class TextPrompt:
    """A text, and how it depends on the view.

    Attributes:
        text: What to make.
        negative: What to push away from; the empty text is the unconditional one.
        views: Texts by direction; None is the same text for every camera (for models that receive the camera itself).
        perp_neg: Pushes away from neighbouring directions; needs `views`.
    """

    text: str
    negative: str = ""
    views: ViewWords | None = None
    perp_neg: PerpNeg | None = None

    def __post_init__(self) -> None:
        """Checks that Perp-Neg has directions.

        Raises:
            ValueError: If it has none.
        """
        if self.perp_neg is not None and self.views is None:
            raise ValueError("perp_neg without views: give views=ViewWords() as well")

    def texts(self) -> tuple[str, ...]:
        """Returns the texts that a model has to encode, besides `negative`: one, or one per direction."""
        return (self.text,) if self.views is None else self.views.texts(self.text)

    def mix(self, cameras: Cameras) -> ViewMix:
        """Returns the texts for each camera."""
        if self.views is None:
            first = torch.zeros_like(cameras.azimuth, dtype=torch.int64)
        elif self.perp_neg is None:
            first = self.views.directions(cameras)
        else:
            return _perp_neg_mix(self.views, self.perp_neg, cameras)
        none = first.new_empty((0, len(first)))
        return ViewMix(first, first, torch.ones_like(cameras.azimuth), none, none.float())


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture of the object, and where it was taken from.

    Attributes:
        image: RGB in [0, 1], over the background that the model expects (white for Zero-1-to-3). [3, height, width]
        camera: Its camera, a batch of one.
    """

    image: Tensor
    camera: Cameras

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: If the image does not have three channels, or there is not exactly one camera.
        """
        if self.image.ndim != 3 or self.image.shape[0] != 3:
            raise ValueError(f"image of shape {tuple(self.image.shape)}: give [3, height, width]")
        if len(self.camera) != 1:
            raise ValueError(f"{len(self.camera)} cameras: give one, that of the image")


def _from_front(cameras: Cameras) -> Tensor:
    """Returns the angle between azimuth and front, 0 to 180 degrees. [batch]."""
    return (torch.remainder(cameras.azimuth + 180, 360) - 180).abs()


def _decay(shape: tuple[float, float, float], ratio: Tensor) -> Tensor:
    scale, rate, offset = shape
    return scale * torch.exp(-rate * ratio) + offset


def _perp_neg_mix(views: ViewWords, strengths: PerpNeg, cameras: Cameras) -> ViewMix:
    """Returns mixes of the two nearest directions' texts, and the directions to push away from."""
    away = _from_front(cameras)
    ahead = away < 90
    ratio = torch.where(ahead, 1 - away / 90, 2 - away / 90)  # of front, or else of side
    first = torch.where(ahead, FRONT, SIDE)
    second = torch.where(ahead, SIDE, BACK)
    weights = torch.stack(
        [
            torch.where(
                ahead, _decay(strengths.front, ratio), _decay(strengths.side_behind, ratio)
            ),
            torch.where(
                ahead, _decay(strengths.side, 1 - ratio), _decay(strengths.front_behind, ratio)
            ),
        ]
    )
    above = cameras.elevation > views.overhead_threshold
    first, second = first.masked_fill(above, OVERHEAD), second.masked_fill(above, OVERHEAD)
    negatives = torch.stack([torch.where(ahead, FRONT, SIDE), torch.where(ahead, SIDE, FRONT)])
    return ViewMix(first, second, ratio, negatives, -weights.masked_fill(above, 0.0))
