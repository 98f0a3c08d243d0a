"""Decides whether the object in a picture is cut out, and cuts it out if it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

MOST_OPAQUE = 0.95
"""Largest share of a picture that an object which is cut out takes up."""

CLEAR_BORDER = 0.5
"""Smallest share of the border that is transparent around an object which is cut out: it may touch the border."""

PLAIN_BORDER = 0.8
"""Smallest share of the border that has the background's colour, for that to be cut."""

NEAR = 12 / 255
"""Largest difference from the background's colour, in any channel, of what still is background."""

EDGE = 2
"""Pixels at the object's edge that may be mixed with the background."""

SPECK = 1e-3
"""Islands smaller than this share of the object are compression noise, not parts of it."""

Pixels = NDArray[Any]
Mask = NDArray[np.bool_]


def cut_out(picture: Image.Image, path: Path, *, cut_background: bool) -> tuple[Pixels, str | None]:
    """Returns a picture whose background is transparent.

    One that has a transparent background is left as it is. A photo that was saved with an alpha channel has none, even
    if a few of its pixels are not quite opaque.

    Args:
        picture: As it was read.
        path: Where from, for messages.
        cut_background: Cut a background of one colour with a flood fill from the border; otherwise rembg does it.

    Returns:
        RGBA in [0, 1], [height, width, 4]; and a note for the user on what was cut, None if nothing was.

    Raises:
        ValueError: If the picture is not cut out, and its background is not of one colour or nothing is installed that
            could cut it.
    """
    rgba = picture.convert("RGBA")
    pixels = _as_floats(rgba)
    why = why_not_cut_out(pixels[..., 3])
    if why is None:
        return pixels, None
    over_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if cut_background:
        return _without_plain_background(_as_floats(over_white), path)
    return _without_background(
        over_white, path, why
    ), f"image={path}: {why}; rembg cut the object out"


def why_not_cut_out(alpha: Pixels) -> str | None:
    """Returns why an alpha channel does not show an object that is cut out, or None if it does.

    Args:
        alpha: In [0, 1]. [height, width]
    """
    opaque = alpha > 0.5
    if opaque.all():
        return "no pixel is transparent"
    if opaque.mean() > MOST_OPAQUE:
        return f"{opaque.mean():.1%} of it is opaque"
    if _border(~opaque).mean() < CLEAR_BORDER:
        return f"{_border(opaque).mean():.0%} of its border is opaque"
    return None


def _without_background(picture: Image.Image, path: Path, why: str) -> Pixels:
    """Returns a picture whose background rembg has removed."""
    try:
        from rembg import remove  # here: it brings onnxruntime, and few pictures need it
    except ImportError as error:
        raise ValueError(
            f"image={path} is not cut out ({why}), and what would cut the object out is not installed: give an RGBA "
            "picture whose background is transparent, add --cut-background if its background is of one colour, or "
            '`pip install "rembg[cpu]"`'
        ) from error
    return _as_floats(remove(picture).convert("RGBA"))


def _without_plain_background(rgb: Pixels, path: Path) -> tuple[Pixels, str]:
    """Cuts a background of one colour out of a picture.

    Only what is connected to the border is background: white parts of an object on white stay, and so does the
    background behind a closed handle.

    Raises:
        ValueError: If the background has more than one colour, or everything is background, or hardly anything is.
    """
    border = _border(rgb)
    colour = np.median(border, axis=0)
    near = np.abs(rgb - colour).max(-1) <= NEAR
    named = "RGB({}, {}, {})".format(*(round(255 * float(channel)) for channel in colour))
    share = _border(near).mean()
    if share < PLAIN_BORDER:
        raise ValueError(
            f"image={path}: --cut-background needs a background of one colour, and only {share:.0%} of the border is "
            f"near its middle colour {named}: give an RGBA picture whose background is transparent, or leave the "
            'option out and `pip install "rembg[cpu]"`'
        )
    seeds = near.copy()
    seeds[1:-1, 1:-1] = False
    background = ndimage.binary_propagation(seeds, mask=near)
    background |= _specks(~background)
    pixels = _with_soft_edge(rgb, background, colour)
    why = "nothing differs from it" if background.all() else why_not_cut_out(pixels[..., 3])
    if why is not None:
        raise ValueError(
            f"image={path}: without its background {named} {why}; give an RGBA picture whose background is transparent"
        )
    return (
        pixels,
        f"image={path}: cut the background {named}, {background.mean():.0%} of the picture",
    )


def _specks(foreground: Mask) -> Mask:
    """Returns the islands of the foreground that are too small to be parts of the object."""
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    small: Mask = sizes < SPECK * sizes.max()
    small[0] = False
    islands: Mask = small[labels]
    return islands


def _with_soft_edge(rgb: Pixels, background: Mask, colour: Pixels) -> Pixels:
    """Returns RGBA of the foreground, without the background's share of the colours at its edge.

    An edge pixel is `alpha * object + (1 - alpha) * background`, the object's colour being that of the nearest pixel
    further inside. Where there is none nearby (parts of a few pixels' width), or one of the background's colour, it
    is opaque.

    Args:
        rgb: In [0, 1]. [height, width, 3]
        background: [height, width]
        colour: The background's. [3]
    """
    inside = ~ndimage.binary_dilation(background, iterations=EDGE)
    alpha = (~background).astype(np.float32)
    if inside.any():
        distance, nearest = ndimage.distance_transform_edt(~inside, return_indices=True)
        step = rgb[tuple(nearest)] - colour  # from the background to the object. [height, width, 3]
        differs = np.abs(step).max(-1) > 2 * NEAR  # or nothing can be said
        edge = ~background & ~inside & (distance <= 2 * EDGE) & differs
        mixed = ((rgb - colour) * step).sum(-1) / np.maximum((step**2).sum(-1), NEAR**2)
        alpha[edge] = mixed.clip(0, 1)[edge]
    clean = colour + (rgb - colour) / np.maximum(alpha, 1e-3)[..., None]
    return np.concatenate([clean.clip(0, 1), alpha[..., None]], -1).astype(np.float32)


def _border(values: Pixels) -> Pixels:
    """Returns the pixels along the four sides. [pixels, ...]."""
    return np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])


def _as_floats(picture: Image.Image) -> Pixels:
    """Converts a picture of 8 bits to [0, 1]. [height, width, channels]."""
    return np.asarray(picture, dtype=np.float32) / 255
