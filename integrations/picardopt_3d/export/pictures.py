"""Renders as pictures: tables of colour, normals and opacity, and the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from picardopt_3d.io import replacing
from picardopt_3d.scenes import Render

Pixels = npt.NDArray[np.uint8]


def to_pixels(images: Tensor) -> Pixels:
    """Converts images in [0, 1], `[..., 1 or 3, height, width]`, to bytes, `[..., height, width, 3]`."""
    if images.shape[-3] == 1:
        images = images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    scaled = (images.detach().float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    pixels: Pixels = scaled.movedim(-3, -1).cpu().numpy()
    return pixels


def normal_colours(render: Render) -> Tensor:
    """Returns normals as colours (n + 1) / 2 over white, `[batch, 3, height, width]`.

    Raises:
        ValueError: The render has no normals.
    """
    if render.normal is None:
        raise ValueError("render.normal is None: render with normals=True")
    return 0.5 * render.normal + 0.5 * render.opacity + (1.0 - render.opacity)


def rows_of(render: Render) -> list[Tensor]:
    """Returns the three rows of a progress picture: colour, normals and opacity, each `[batch, 3, height, width]`."""
    return [render.rgb, normal_colours(render), render.opacity.expand_as(render.rgb)]


def tile(rows: Sequence[Tensor], *, scale: int = 1, gap: int = 2) -> Pixels:
    """Arranges images in a table on white.

    Args:
        rows: For each row a batch of images of one size, `[batch, 3, height, width]`.
        scale: Integer enlargement (bicubic).
        gap: Pixels between images.
    """
    height, width = rows[0].shape[-2] * scale, rows[0].shape[-1] * scale
    columns = max(row.shape[0] for row in rows)
    sheet = np.full(
        (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for y, row in enumerate(rows):
        for x, pixels in enumerate(to_pixels(row)):
            top, left = gap + y * (height + gap), gap + x * (width + gap)
            sheet[top : top + height, left : left + width] = enlarge(pixels, scale)
    return sheet


def enlarge(pixels: Pixels, scale: int) -> Pixels:
    """Enlarges one picture, `[height, width, 3]`, by an integer factor."""
    if scale == 1:
        return pixels
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def save_png(pixels: Pixels, path: Path) -> None:
    """Writes a picture as a PNG, atomically."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def save_contact_sheet(
    rows: Sequence[tuple[str, Tensor]], title: str, path: Path, *, scale: int = 1
) -> None:
    """Writes a titled table of views with a label beside every row.

    Args:
        rows: Label and images of each row, each `[batch, 3, height, width]`.
        title: Text above the table.
        path: The PNG to write.
        scale: Integer enlargement of the images.
    """
    table = tile([images for _, images in rows], scale=scale)
    margin, head = 92, 40
    sheet = Image.new("RGB", (table.shape[1] + margin, table.shape[0] + head), "white")
    sheet.paste(Image.fromarray(table), (margin, head))
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 9), title, fill="black", font=ImageFont.load_default(size=20))
    label_font = ImageFont.load_default(size=14)
    height = table.shape[0] / len(rows)
    for index, (label, _) in enumerate(rows):
        draw.text(
            (12, head + (index + 0.5) * height), label, fill="black", font=label_font, anchor="lm"
        )
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
