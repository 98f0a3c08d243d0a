"""Training data for the guidance model: views of the built-in world, rendered once and coloured as they are drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from picardopt_3d.cameras import CameraConfig, Cameras, random_cameras
from picardopt_3d.domain import CAPTIONS, COLOURS, SHAPES, Subject, colourize, render_shading

_CHUNK = 64  # views rendered together: more do not fit the processor's caches


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        views: RGB in [-1, 1]. [batch, 3, height, width]
        captions: One a view; "" where the caption was dropped.
        conditions: Camera vectors; zero where the camera was dropped. [batch, CONDITION_SIZE]
    """

    views: Tensor
    captions: list[str]
    conditions: Tensor


class Views:
    """Views of every shape, without colour, from random cameras.

    Args:
        shaded: Shading and alpha, uint8. [shapes, views, 2, height, width]
        conditions: Camera vectors. [shapes, views, CONDITION_SIZE]
    """

    def __init__(self, shaded: Tensor, conditions: Tensor) -> None:
        self.shaded = shaded
        self.conditions = conditions
        self._colours = torch.tensor(list(COLOURS.values()))

    @classmethod
    def cached(cls, path: Path, count: int, size: int, seed: int) -> Views:
        """Load the views from a file, or render them and write it.

        Args:
            path: The file.
            count: Views a shape.
            size: Pixels along a side.
            seed: Seed of the cameras.
        """
        key = {"count": count, "size": size, "seed": seed}
        if path.exists():
            saved = torch.load(path, weights_only=True)
            if saved["key"] == key:
                return cls(saved["shaded"], saved["conditions"])
        views = cls._render(count, size, seed)
        temporary = path.with_suffix(".partial")
        torch.save({"key": key, "shaded": views.shaded, "conditions": views.conditions}, temporary)
        os.replace(temporary, path)
        return views

    @classmethod
    def _render(cls, count: int, size: int, seed: int) -> Views:
        shaded, conditions = [], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for shape in tqdm(SHAPES, desc="rendering views", mininterval=5):
                cameras = random_cameras(count, CameraConfig())
                shaded.append(torch.cat([_bytes(shape, part, size) for part in _chunks(cameras)]))
                conditions.append(cameras.condition())
        return cls(torch.stack(shaded), torch.stack(conditions))

    def draw(
        self, batch: int, generator: torch.Generator, drop_caption: float, drop_camera: float
    ) -> Batch:
        """Draw a batch: any shape in any colour from any of its cameras, in any of its captions.

        Args:
            batch: How many views.
            generator: For every draw.
            drop_caption: Chance that a view comes without its caption.
            drop_camera: Chance that a view comes without its camera.
        """

        def index(limit: int) -> Tensor:
            return torch.randint(limit, (batch,), generator=generator)

        shapes, colours = index(len(SHAPES)), index(len(COLOURS))
        which, phrase = index(self.shaded.shape[1]), index(len(CAPTIONS))
        keep_caption, keep_camera = torch.rand(2, batch, generator=generator)
        views = colourize(self.shaded[shapes, which].float() / 255, self._colours[colours])
        names = zip(shapes.tolist(), colours.tolist(), phrase.tolist(), strict=True)
        captions = [
            Subject(list(SHAPES)[shape], list(COLOURS)[colour]).captions[words]
            for shape, colour, words in names
        ]
        captions = [
            text if keep else ""
            for text, keep in zip(captions, (keep_caption >= drop_caption).tolist(), strict=True)
        ]
        conditions = self.conditions[shapes, which] * (keep_camera >= drop_camera)[:, None]
        return Batch(2 * views - 1, captions, conditions)


def _chunks(cameras: Cameras) -> list[Cameras]:
    return [cameras[start : start + _CHUNK] for start in range(0, len(cameras), _CHUNK)]


def _bytes(shape: str, cameras: Cameras, size: int) -> Tensor:
    return (render_shading(shape, cameras, size, size) * 255).round().to(torch.uint8)
