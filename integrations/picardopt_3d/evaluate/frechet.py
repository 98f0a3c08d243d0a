"""The Frechet distance between two sets of pictures, computed from their features.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) is the distance between Gaussians with the sets' means and covariances
(Heusel et al. 2017, arXiv 1706.08500, equation 6). The paper takes the features from CLIP-B/32 instead of Inception.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picardopt_3d.io import replacing

Floats = npt.NDArray[np.float64]

_ENTRIES = ("mean", "covariance", "count", "model", "fingerprint", "source")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of a set of pictures, and the model that computed them.

    Attributes:
        mean: Mean, `[features]`.
        covariance: Unbiased covariance (divided by count - 1), `[features, features]`.
        count: Number of pictures.
        model: Name of the model that computed the features.
        fingerprint: Hash of that model's weights.
        source: Description of the pictures.
    """

    mean: Floats
    covariance: Floats
    count: int
    model: str = ""
    fingerprint: str = ""
    source: str = ""


def statistics_of(
    features: npt.ArrayLike, model: str = "", fingerprint: str = "", source: str = ""
) -> Statistics:
    """Returns mean and covariance of features, in double precision.

    Args:
        features: Features of the pictures, `[pictures, features]`.
        model: Name of the model that computed the features.
        fingerprint: Hash of that model's weights.
        source: Description of the pictures.

    Raises:
        ValueError: There are fewer than two pictures, or features that are not finite.
    """
    table = np.asarray(features, dtype=np.float64)
    if len(table) < 2:
        raise ValueError(
            f"features of {len(table)} picture(s): a Frechet distance needs at least two pictures in each set"
        )
    if not np.isfinite(table).all():
        raise ValueError(
            "some features are not finite: the pictures hold NaN or infinity; leave such runs out"
        )
    covariance = np.atleast_2d(np.cov(table, rowvar=False))
    return Statistics(table.mean(0), covariance, len(table), model, fingerprint, source)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Returns the squared Frechet distance, the form in which FID is reported.

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). This needs only symmetric roots,
    which exist for every rank, so that it is exact even with fewer pictures than features, where the usual root of the
    product becomes complex. The *estimate* from few pictures is still biased: it grows as their number falls, so
    compare equal numbers only.

    Raises:
        ValueError: The features have different sizes.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"{len(first.mean)} features against {len(second.mean)}: give statistics of the same model"
        )
    shift = first.mean - second.mean
    common = np.linalg.svd(_root(first.covariance) @ _root(second.covariance), compute_uv=False)
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * common.sum()
    return max(0.0, float(shift @ shift + spread))


def _root(matrix: Floats) -> Floats:
    """Returns the symmetric square root of a covariance; eigenvalues within rounding error of 0 count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    noise = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    root: Floats = (vectors * roots) @ vectors.T
    return root


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes statistics as an npz file, atomically."""
    content: dict[str, Any] = {name: np.asarray(getattr(statistics, name)) for name in _ENTRIES}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **content)


def load_statistics(path: Path, fingerprint: str, model: str) -> Statistics:
    """Reads statistics that `save_statistics` wrote.

    Args:
        path: The npz file.
        fingerprint: Hash of the weights of the model that computes the other features.
        model: Name of that model, for the message.

    Raises:
        ValueError: The file is damaged, holds something else, or holds statistics of another model.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _ENTRIES if name not in file]
            values = {name: file[name] for name in _ENTRIES if name not in missing}
    except Exception as error:  # zipfile, pickle and numpy each raise their own for a damaged file
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} cannot be read as statistics ({error}): write it anew with `picardopt evaluate --make-reference`"
        ) from error
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: give a file that `picardopt evaluate --make-reference` wrote"
        )
    mean, covariance = (values[name].astype(np.float64) for name in ("mean", "covariance"))
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"{path}: mean {mean.shape} and covariance {covariance.shape} do not match; write the file anew"
        )
    texts = {name: str(values[name]) for name in ("model", "fingerprint", "source")}
    if texts["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} holds statistics of {texts['model']!r}, but pictures are judged by another model, {model!r}: give "
            f"--clip that model, or write the reference anew with this one"
        )
    return Statistics(mean, covariance, int(values["count"]), **texts)
