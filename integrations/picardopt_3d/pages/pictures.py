"""Pictures as a page holds them: inside it, as text."""

from __future__ import annotations

import base64
import io
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image

_MOST = 600_000
"""Bytes of a PNG that is kept as it is; a larger picture becomes a JPEG."""

_COLUMNS = 6
_VIEWS = 24
_PIXELS = 240
"""Most pixels along an edge of a film's view."""


@dataclass(frozen=True)
class FilmViews:
    """Views of a film of one turn, evenly spaced, in two sheets of the same layout, row by row.

    Attributes:
        colour: The sheet of colours, a data URI.
        normals: The sheet of normals, a data URI.
        views: Number of views; the first one is from the front, the others follow the azimuth.
        columns: Views in a row.
        pixels: Along each edge of a view.
    """

    colour: str
    normals: str
    views: int
    columns: int
    pixels: int


def picture_of(pixels: npt.NDArray[np.uint8]) -> str:
    """Returns a picture as a data URI: a PNG, or a JPEG where that is large.

    Args:
        pixels: RGB, `[height, width, 3]`.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return _uri(buffer.getvalue(), "png") if buffer.tell() <= _MOST else _jpeg(pixels)


def picture_in(path: Path) -> str | None:
    """Returns the picture in a PNG file as a data URI; None: there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) <= _MOST:
        return _uri(content, "png")
    with Image.open(path) as picture:
        white = Image.new("RGBA", picture.size, "white")
        return _jpeg(
            np.asarray(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))
        )


def film_views(path: Path) -> FilmViews | None:
    """Returns views of a run's film, whose frames have colours on the left and normals on the right.

    Returns:
        None: there is no such film.

    Raises:
        ValueError: The file is no film.
    """
    if not path.is_file():
        return None
    frames = _frames(path)
    views = min(_VIEWS, len(frames))
    chosen = frames[[round(index * len(frames) / views) for index in range(views)]]
    left, right = np.split(chosen, 2, axis=2)
    return FilmViews(_jpeg(_sheet(left)), _jpeg(_sheet(right)), views, _COLUMNS, left.shape[1])


def _frames(path: Path) -> npt.NDArray[np.uint8]:
    """Returns all frames of a film, made smaller, `[frames, height, 2 height, 3]`."""
    # One call of ffmpeg, because imageio's reader leaves open pipes behind.
    smaller = f"scale=-2:'min({_PIXELS},ih)':flags=area"
    order = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-vf", smaller]
    done = subprocess.run(
        [*order, "-f", "image2pipe", "-c:v", "ppm", "-"], capture_output=True, check=False
    )
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"{path} is no film: {said[-1] if said else 'it has no frames'}")
    # Each frame is a PPM: "P6", width and height, 255, then the bytes.
    head = done.stdout[:64].split(b"\n", 3)
    width, height = (int(number) for number in head[1].split())
    start = sum(len(line) + 1 for line in head[:3])
    each = start + width * height * 3
    table = np.frombuffer(done.stdout, np.uint8).reshape(-1, each)
    frames: npt.NDArray[np.uint8] = table[:, start:].reshape(-1, height, width, 3)
    return frames


def _sheet(views: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns views in rows of `_COLUMNS`, the last one filled up with white."""
    count, height, width, _ = views.shape
    rows = -(-count // _COLUMNS)
    full = np.full((rows * _COLUMNS, height, width, 3), 255, np.uint8)
    full[:count] = views
    table = full.reshape(rows, _COLUMNS, height, width, 3).swapaxes(1, 2)
    sheet: npt.NDArray[np.uint8] = table.reshape(rows * height, _COLUMNS * width, 3)
    return sheet


def _jpeg(pixels: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return _uri(buffer.getvalue(), "jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
