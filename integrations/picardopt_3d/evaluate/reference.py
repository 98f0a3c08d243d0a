"""The pictures that results are compared with as a set: a folder of photographs, or the built-in world."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..cameras import Cameras
from ..domain import COLOURS, SHAPES, colourize, render_shading
from .clip import ClipJudge
from .frechet import Statistics, load_statistics, statistics_of

DOMAIN = "domain"
"""Stands for the true views of the built-in world, where a folder could be named."""

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Of files that are taken for pictures, in whatever case."""

_BATCH = 64


def find_reference(judge: ClipJudge, source: Path) -> Statistics:
    """The statistics of a reference: read, if it is a file, or else made of a folder's pictures.

    Args:
        judge: Whose features are compared.
        source: An npz file, or a folder of pictures.

    Raises:
        FileNotFoundError: There is no such file or folder, or no picture in it.
        ValueError: The file holds something else, or is of another model.
    """
    if source.is_dir():
        return folder_statistics(judge, source)
    if not source.is_file():
        raise FileNotFoundError(
            f"fid-reference={str(source)!r}: there is no such file or folder; give a folder of pictures, or an npz "
            f"file that `picardopt evaluate --make-reference` wrote"
        )
    return load_statistics(source, judge.fingerprint(), judge.name)


def folder_statistics(judge: ClipJudge, folder: Path) -> Statistics:
    """Statistics of all pictures in a folder and its subfolders.

    Args:
        judge: Whose features are taken.
        folder: Where the pictures are; for the paper's reference, ImageNet-2012's 50,000 validation pictures.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: There is only one picture, or a file that cannot be opened as one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), nor do its subfolders"
        )
    features = []
    with tqdm(total=len(paths), desc="reference", unit="picture") as bar:
        for start in range(0, len(paths), _BATCH):
            pictures = [_opened(path) for path in paths[start : start + _BATCH]]
            features.append(judge.image_features(pictures).cpu().numpy())
            bar.update(len(pictures))
    return statistics_of(np.concatenate(features), judge.name, judge.fingerprint(), folder.name)


def domain_statistics(judge: ClipJudge, cameras: Cameras, size: int) -> Statistics:
    """Statistics of the true views of all subjects of the built-in world.

    Args:
        judge: Whose features are taken.
        cameras: Where each subject is seen from.
        size: Pixels along each edge.
    """
    features = list(_domain_features(judge, cameras, size))
    what = (
        f"{len(features)} subjects of the built-in world, {len(cameras)} views each, {size} pixels"
    )
    return statistics_of(np.concatenate(features), judge.name, judge.fingerprint(), what)


@torch.no_grad()
def _domain_features(
    judge: ClipJudge, cameras: Cameras, size: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Features of each subject's views; each shape is rendered once."""
    parts = [cameras[start : start + _BATCH] for start in range(0, len(cameras), _BATCH)]
    with tqdm(total=len(SHAPES) * len(COLOURS), desc="reference", unit="subject") as bar:
        for shape in SHAPES:
            shaded = torch.cat([render_shading(shape, part, size, size) for part in parts])
            for colour in COLOURS.values():
                views = colourize(shaded, torch.tensor(colour)).clamp(0, 1)
                batches = [judge.image_features(batch) for batch in views.split(_BATCH)]
                yield torch.cat(batches).cpu().numpy()
                bar.update()


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be opened as a picture: {error}") from error
