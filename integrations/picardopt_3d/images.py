"""Reads the picture that an object is made from, cuts the object out and centres it.

Zero-1-to-3 expects an object that is cut out over white, in the middle of a square picture, and takes up three quarters
of it (its released demo). A picture whose camera is exact, such as the examples, is left as it is (`framed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.cut_out import Pixels, cut_out
from picardopt_3d.io import replacing
from picardopt_3d.prompts import ImagePrompt

SHARE = 0.75
"""How much of the picture the longer side of the object takes up (Zero-1-to-3's preprocessing)."""

SMALLEST = 16
"""Smallest length of the object in pixels; fewer show too little to learn from."""


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """A square picture of an object that is cut out.

    Attributes:
        rgb: Over white, in [0, 1]. [3, size, size]
        alpha: The object's share of each pixel, in [0, 1]. [1, size, size]
        camera: Where it was taken from, a batch of one.
    """

    rgb: Tensor
    alpha: Tensor
    camera: Cameras

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: If they do not go together.
        """
        size = self.rgb.shape[-1]
        if self.rgb.shape != (3, size, size) or self.alpha.shape != (1, size, size):
            raise ValueError(
                f"rgb of shape {tuple(self.rgb.shape)}, alpha of shape {tuple(self.alpha.shape)}: give "
                "[3, size, size] and [1, size, size]"
            )
        if len(self.camera) != 1:
            raise ValueError(f"{len(self.camera)} cameras: give one, that of the picture")

    def prompt(self) -> ImagePrompt:
        """Returns the prompt for a score model."""
        return ImagePrompt(self.rgb, self.camera)

    def at(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns colour over white and alpha at another size. [3, size, size] and [1, size, size]."""
        colour, alpha = resized(torch.cat([self.rgb, self.alpha])[None], size)[0].split([3, 1])
        return colour, alpha


def prepare_reference(
    source: Path,
    target: Path,
    *,
    framed: bool = False,
    share: float = SHARE,
    cut_background: bool = False,
) -> str | None:
    """Reads a picture, cuts its object out if that is not done yet, brings it to the middle, and writes it as RGBA.

    Args:
        source: A picture of any usual format. With a transparent background: what is opaque is the object. Without:
            the background is removed as `cut_background` says.
        target: The PNG to write; `load_reference(target, prepared=True)` reads it.
        framed: Leave the object where and as large as it is (the picture must be square); for pictures whose camera
            is exact.
        share: How much of the picture the longer side of the object is to take up otherwise.
        cut_background: Cut a background of one colour, by a flood fill from the border; False leaves it to rembg, if
            that is installed.

    Returns:
        A note for the user on what was cut; None if nothing was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a picture, shows no object or a tiny one, is not square where it has to be, or is
            not cut out and cannot be.
    """
    pixels, note = _prepared(source, framed, share, cut_background)
    with replacing(target) as temporary:
        _as_picture(pixels).save(temporary, format="PNG")
    return note


def load_reference(
    path: Path,
    *,
    elevation: float,
    azimuth: float,
    distance: float,
    fov: float,
    framed: bool = False,
    share: float = SHARE,
    size: int = 512,
    cut_background: bool = False,
    prepared: bool = False,
) -> ReferenceImage:
    """Reads a picture as `prepare_reference` does, with the camera that took it.

    Args:
        path: The picture.
        elevation: Of its camera, degrees above the horizon.
        azimuth: Of its camera, degrees about the vertical axis.
        distance: Of its camera from the origin, scene units.
        fov: Its field of view, degrees.
        framed: As for `prepare_reference`.
        share: As for `prepare_reference`.
        size: Pixels along a side of what is made of it.
        cut_background: As for `prepare_reference`.
        prepared: `prepare_reference` wrote it: it is taken as it is.

    Raises:
        FileNotFoundError: As of `prepare_reference`.
        ValueError: As of `prepare_reference`.
    """
    if prepared:
        pixels = _as_tensor(np.asarray(_read(path).convert("RGBA"), dtype=np.float32) / 255)
    else:
        pixels, _ = _prepared(path, framed, share, cut_background)
    # Colours of transparent pixels mean nothing: weighted by the alpha they do not bleed into the object's edge.
    weighted = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
    colour, alpha = resized(weighted[None], size)[0].split([3, 1])
    camera = orbit_cameras(elevation, azimuth, distance, fov)
    return ReferenceImage((colour + (1 - alpha)).clamp(0, 1), alpha, camera)


def save_reference(picture: ReferenceImage, path: Path) -> None:
    """Writes a picture as an RGBA PNG that `load_reference` reads with `framed=True`."""
    alpha = picture.alpha
    colour = (picture.rgb - (1 - alpha)) / alpha.clamp(min=1e-3)
    with replacing(path) as temporary:
        _as_picture(torch.cat([colour, alpha])).save(temporary, format="PNG")


def resized(pictures: Tensor, size: int) -> Tensor:
    """Resizes pictures, smoothly where they shrink. [batch, channels, ...] to [batch, channels, size, size]."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    return torch.nn.functional.interpolate(
        pictures, (size, size), mode="bilinear", align_corners=False, antialias=True
    ).clamp(0, 1)


def _prepared(
    path: Path, framed: bool, share: float, cut_background: bool
) -> tuple[Tensor, str | None]:
    """Returns RGBA in [0, 1] of a square picture whose object is cut out, [4, side, side], and a note on the cut."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give a part of the picture, from 0 to 1")
    content, note = cut_out(_read(path), path, cut_background=cut_background)
    pixels = _as_tensor(content)
    box = _bounds(pixels[3], path)
    if not framed:
        return _centred(pixels, box, share), note
    if pixels.shape[1] != pixels.shape[2]:
        raise ValueError(
            f"image={path} is {pixels.shape[2]} x {pixels.shape[1]} pixels: a framed picture has to be square; crop "
            "it, or let it be centred (framed=False)"
        )
    return pixels, note


def _as_tensor(pixels: Pixels) -> Tensor:
    """Channels first. [4, height, width]."""
    return torch.from_numpy(pixels).movedim(-1, 0)


def _as_picture(pixels: Tensor) -> Image.Image:
    """Converts RGBA in [0, 1] to a picture of 8 bits per channel. [4, height, width]."""
    content = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(content.movedim(0, -1).contiguous().numpy())


def _read(path: Path) -> Image.Image:
    """Reads a picture of 8 bits per channel and turns it the right way up."""
    if not path.is_file():
        raise FileNotFoundError(f"image={path}: there is no such file; give a picture")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image={path} cannot be read ({error}); give a PNG, JPEG or WebP picture"
        ) from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"image={path} has pixels of mode {picture.mode}: save it with 8 bits a channel"
        )
    return picture


def _bounds(alpha: Tensor, path: Path) -> tuple[int, int, int, int]:
    """Returns the object's first and last row, first and last column; ends are exclusive.

    Raises:
        ValueError: If there is no object, or hardly any.
    """
    solid = alpha > 0.5
    rows, columns = solid.any(1).nonzero().flatten(), solid.any(0).nonzero().flatten()
    if not len(rows):
        raise ValueError(
            f"image={path}: nothing in it is opaque; give a picture whose object is opaque and whose background is not"
        )
    box = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    longer = max(box[1] - box[0], box[3] - box[2])
    if longer < SMALLEST:
        raise ValueError(
            f"image={path}: the object is {longer} pixels long; give a picture where it is at least {SMALLEST}"
        )
    return box


def _centred(pixels: Tensor, box: tuple[int, int, int, int], share: float) -> Tensor:
    """Cuts a square from a picture with the object in its middle, transparent beyond the picture. [4, side, side]."""
    top, bottom, left, right = box
    side = max(1, round(max(bottom - top, right - left) / share))
    first_row, first_column = (top + bottom - side) // 2, (left + right - side) // 2
    square = pixels.new_zeros(4, side, side)
    height, width = pixels.shape[1:]
    rows = slice(max(0, first_row), min(height, first_row + side))
    columns = slice(max(0, first_column), min(width, first_column + side))
    square[
        :,
        rows.start - first_row : rows.stop - first_row,
        columns.start - first_column : columns.stop - first_column,
    ] = pixels[:, rows, columns]
    return square


if __name__ == "__main__":
    from picardopt_3d.world.pictures import main

    main()
