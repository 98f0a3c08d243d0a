"""A film of the object making one turn about its axis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from torch import Tensor

from picardopt_3d.export.pictures import enlarge, normal_colours, to_pixels
from picardopt_3d.io import replacing
from picardopt_3d.scenes import Render


def film_pixels(size: int) -> int:
    """Returns the pixels along an edge of a film's views, before they are enlarged.

    Args:
        size: Along an edge of the views of the run's last step.
    """
    return min(max(size, 96), 256) // 16 * 16


def frames_of(render: Render, scale: int = 1) -> list[np.ndarray]:
    """Returns one frame per view with colour and normals side by side, each `[height, 2 width, 3]`."""
    both: Tensor = normal_colours(render)
    pairs = zip(to_pixels(render.rgb), to_pixels(both), strict=True)
    return [np.concatenate([enlarge(a, scale), enlarge(b, scale)], axis=1) for a, b in pairs]


def save_film(frames: Iterable[np.ndarray], path: Path, *, fps: int = 30) -> int:
    """Encodes frames as H.264 that browsers play; returns the number of frames.

    Args:
        frames: Pictures of one size, both edges a multiple of 16 pixels, uint8, `[height, width, 3]`.
        path: The mp4 file, written atomically.
        fps: Frames per second.
    """
    count = 0
    with replacing(path) as temporary:
        writer = imageio.get_writer(
            temporary, format="FFMPEG", fps=fps, codec="libx264", quality=8, pixelformat="yuv420p"
        )
        try:
            for picture in frames:
                writer.append_data(picture)
                count += 1
        finally:
            writer.close()
    return count
