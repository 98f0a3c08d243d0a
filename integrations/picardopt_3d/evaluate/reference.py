"""The reference of the Frechet distance: a folder of pictures, or statistics of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.evaluate.frechet import Statistics, load_statistics, statistics_of

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Suffixes of picture files, in lower case."""

_BATCH = 64


def find_reference(judge: ClipJudge, source: Path) -> Statistics:
    """Returns the statistics of a reference, read from a file or computed from a folder's pictures.

    Args:
        judge: The model that computes the features.
        source: An npz file, or a folder of pictures.

    Raises:
        FileNotFoundError: There is no such file or folder, or no picture in it.
        ValueError: The file holds something else, or statistics of another model.
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
    """Returns the statistics of all pictures in a folder and its subfolders.

    Args:
        judge: The model that computes the features.
        folder: Folder of the pictures (in the paper, ImageNet-2012's 50,000 validation pictures).

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: There is only one picture, or a file cannot be opened as a picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"{folder} and its subfolders hold no pictures: give a folder with files in {', '.join(sorted(SUFFIXES))}"
        )
    features = []
    with tqdm(total=len(paths), desc="reference", unit="picture") as bar:
        for start in range(0, len(paths), _BATCH):
            pictures = [_opened(path) for path in paths[start : start + _BATCH]]
            features.append(judge.image_features(pictures).cpu().numpy())
            bar.update(len(pictures))
    return statistics_of(np.concatenate(features), judge.name, judge.fingerprint(), folder.name)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            converted: Image.Image = picture.convert("RGB")
            return converted
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path} cannot be opened as a picture ({error}): repair it or remove it"
        ) from error
