"""Reading films back, for the tests."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np


def read_film(path: Path) -> list[np.ndarray]:
    """Every frame of a film. # each [height, width, 3]"""
    with warnings.catch_warnings():
        # imageio's ffmpeg reader leaves its two pipes to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        reader: Any = imageio.get_reader(path)
        with reader:
            frames = [np.asarray(frame) for frame in reader]
        del reader
        gc.collect()
    return frames
