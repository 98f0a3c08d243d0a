"""Training data: views of the built-in world, rendered once without colour and coloured in each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from picardopt_3d.cameras import CameraConfig, Cameras, orbit_cameras, random_cameras
from picardopt_3d.io import replacing
from picardopt_3d.world import (
    BACKGROUND,
    CAPTIONS,
    COLOURS,
    SHAPES,
    Subject,
    all_subjects,
    colourize,
    held_out_subjects,
    render_shading,
)

WIDE_CAMERAS = CameraConfig(elevation=(-10.0, 80.0))
"""Distribution of the cameras that the shipped models are trained on."""

_RAYS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}  # on a CPU, more would exceed its caches


@dataclass(frozen=True)
class Draw:
    """A batch of views as indices, each `[batch]`.

    Attributes:
        shape: Index into `SHAPES`.
        colour: Index into `COLOURS`.
        view: Index into the rendered views of the shape.
    """

    shape: Tensor
    colour: Tensor
    view: Tensor


class Views:
    """Views of every shape from random cameras, stored without colour.

    Args:
        shaded: Shading and alpha, uint8, `[shapes, views, 2, height, width]`.
        poses: Elevation, azimuth (degrees), distance (world units), field of view (degrees), `[shapes, views, 4]`.
        subjects: The subjects that batches are drawn from.
    """

    def __init__(self, shaded: Tensor, poses: Tensor, subjects: Sequence[Subject]) -> None:
        device = shaded.device
        self.shaded, self.poses = shaded, poses
        self.conditions = torch.stack(
            [orbit_cameras(*pose.unbind(-1)).condition() for pose in poses]
        )  # [shapes, views, CONDITION_SIZE]
        self._colours = torch.tensor(list(COLOURS.values()), device=device)
        self._background = torch.tensor(BACKGROUND, device=device)
        shapes, colours = list(SHAPES), list(COLOURS)
        self._subjects = torch.tensor(
            [(shapes.index(s.shape), colours.index(s.colour)) for s in subjects], device=device
        )

    @classmethod
    def cached(
        cls,
        path: Path,
        count: int,
        size: int,
        seed: int,
        cameras: CameraConfig = WIDE_CAMERAS,
        subjects: Sequence[Subject] | None = None,
        device: torch.device | str = "cpu",
    ) -> Views:
        """Loads the views from a file; if it does not exist or differs, renders the views and writes the file.

        Args:
            path: The file.
            count: Number of views per shape.
            size: Pixels along a side.
            seed: Seed of the cameras.
            cameras: Distribution of the cameras.
            subjects: The subjects to draw from; by default all but the held-out ones.
            device: Device that renders and holds the views.
        """
        key = {"count": count, "size": size, "seed": seed, "cameras": str(asdict(cameras))}
        saved: dict[str, Any] = (
            torch.load(path, weights_only=True) if path.exists() else {"key": None}
        )
        if saved["key"] != key:
            shaded, poses = _render(count, size, seed, cameras, device)
            saved = {"key": key, "shaded": shaded.cpu(), "poses": poses.cpu()}
            with replacing(path) as temporary:  # several runs may share the file
                torch.save(saved, temporary)
        chosen = trained_subjects() if subjects is None else subjects
        return cls(saved["shaded"].to(device), saved["poses"].to(device), chosen)

    def draw(self, batch: int, generator: torch.Generator) -> Draw:
        """Draws a batch of random subjects from random cameras.

        Args:
            batch: Number of views.
            generator: Source of the random numbers.
        """
        subject = self._subjects[self._index(len(self._subjects), batch, generator)]
        view = self._index(self.shaded.shape[1], batch, generator)
        return Draw(subject[:, 0], subject[:, 1], view)

    def again(self, draw: Draw, generator: torch.Generator) -> Draw:
        """Draws other cameras for the same subjects."""
        view = self._index(self.shaded.shape[1], len(draw.view), generator)
        return Draw(draw.shape, draw.colour, view)

    def clean(self, draw: Draw) -> Tensor:
        """Returns the views, RGB in [-1, 1], `[batch, 3, height, width]`."""
        shaded = self.shaded[draw.shape, draw.view].float() / 255
        return 2 * colourize(shaded, self._colours[draw.colour], self._background) - 1

    def rough(self, draw: Draw, generator: torch.Generator) -> Tensor:
        """Returns the views as an unfinished optimization shows them, RGB in [-1, 1], `[batch, 3, height, width]`.

        At random, each view is moved and scaled a little, blurred, made translucent, changed in colour, made noisy, and
        given a plain background of a random colour.
        """
        draws = torch.rand(len(draw.view), 16, generator=generator, device=generator.device)
        shaded = self.shaded[draw.shape, draw.view].float() / 255
        shaded = _soften(_warp(shaded, draws[:, :3]), draws[:, 3:5])
        shaded = shaded * (1 - 0.3 * draws[:, 5].square())[:, None, None, None]
        colours = (self._colours[draw.colour] + 0.16 * (draws[:, 6:9] - 0.5)).clamp(0, 1)
        white = (draws[:, 9] < 0.5)[:, None]
        background = torch.where(white, torch.ones_like(colours), draws[:, 10:13])
        clean = 2 * colourize(shaded, colours, background) - 1
        noise = torch.randn(clean.shape, generator=generator, device=generator.device)
        strength = 0.3 * (2 * draws[:, 13] - 1).clamp(min=0)
        return (clean + strength[:, None, None, None] * noise).clamp(-1, 1)

    def pose(self, draw: Draw) -> Tensor:
        """Returns elevation and azimuth (degrees), distance and field of view (degrees), `[batch, 4]`."""
        return self.poses[draw.shape, draw.view]

    def _index(self, limit: int, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(limit, (batch,), generator=generator, device=generator.device)


def trained_subjects() -> tuple[Subject, ...]:
    """Returns all subjects but the held-out ones."""
    held_out = held_out_subjects()
    return tuple(subject for subject in all_subjects() if subject not in held_out)


def caption_table(
    tokenizer: Any, said: Callable[[str], Sequence[str]] = lambda text: (text,)
) -> Tensor:
    """Returns the tokens of every caption of every subject, so that no step has to tokenize.

    Args:
        tokenizer: A CLIP tokenizer.
        said: Maps a caption to its texts, such as `ViewWords().texts`.

    Returns:
        The tokens, `[shapes, colours, captions, texts, tokens]`.
    """
    texts = [
        text
        for shape in SHAPES
        for colour in COLOURS
        for caption in Subject(shape, colour).captions
        for text in said(caption)
    ]
    tokens = tokenize(tokenizer, texts)
    table: Tensor = tokens.unflatten(0, (len(SHAPES), len(COLOURS), len(CAPTIONS), -1))
    return table


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Returns the tokens of texts, padded to the tokenizer's length, `[texts, tokens]`."""
    tokens: Tensor = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return tokens


def _warp(shaded: Tensor, draws: Tensor) -> Tensor:
    """Scales pictures by 0.8 to 1.25 and shifts them by up to a tenth; pixels from outside are empty."""
    scale = 1.25 ** (2 * draws[:, 0] - 1)
    grid = torch.zeros(len(shaded), 2, 3, device=shaded.device)
    grid[:, 0, 0] = grid[:, 1, 1] = scale
    grid[:, :, 2] = 0.2 * (2 * draws[:, 1:3] - 1)
    flow = functional.affine_grid(grid, list(shaded.shape), align_corners=False)
    return functional.grid_sample(shaded, flow, mode="bilinear", align_corners=False)


def _soften(shaded: Tensor, draws: Tensor) -> Tensor:
    """Mixes pictures with copies at half or a quarter of the resolution."""
    size = list(shaded.shape[-2:])
    soft, softer = (
        functional.interpolate(
            functional.avg_pool2d(shaded, factor), size, mode="bilinear", align_corners=False
        )
        for factor in (2, 4)
    )
    share = (1.5 * draws[:, 0] - 0.5).clamp(min=0)  # a third of the pictures stays sharp
    chosen = torch.where((draws[:, 1] < 0.6)[:, None, None, None], soft, softer)
    return shaded + share[:, None, None, None] * (chosen - shaded)


def _render(
    count: int, size: int, seed: int, config: CameraConfig, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    at_once = max(1, _RAYS_AT_ONCE[torch.device(device).type] // (4 * size * size))
    shaded, poses = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for shape in tqdm(SHAPES, desc="rendering views", mininterval=5):
            cameras = random_cameras(count, config).to(device)
            parts = [cameras[i : i + at_once] for i in range(0, count, at_once)]
            shaded.append(torch.cat([_bytes(shape, part, size) for part in parts]))
            seen = (cameras.elevation, cameras.azimuth, cameras.distance, cameras.fov)
            poses.append(torch.stack(seen, dim=-1))
    return torch.stack(shaded), torch.stack(poses)


def _bytes(shape: str, cameras: Cameras, size: int) -> Tensor:
    return (render_shading(shape, cameras, size, size) * 255).round().to(torch.uint8)
