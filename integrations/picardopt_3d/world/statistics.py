"""The built-in world as a set of pictures that results are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from picardopt_3d.cameras import Cameras
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.evaluate.frechet import Statistics, statistics_of
from picardopt_3d.world.shapes import SHAPES
from picardopt_3d.world.subjects import COLOURS
from picardopt_3d.world.views import colourize, render_shading

_BATCH = 64


def world_statistics(judge: ClipJudge, cameras: Cameras, size: int) -> Statistics:
    """Returns statistics of the true views of all subjects of the built-in world.

    Args:
        judge: Whose features are taken.
        cameras: Where each subject is seen from.
        size: Pixels along each edge.
    """
    features = list(_features(judge, cameras, size))
    what = (
        f"{len(features)} subjects of the built-in world, {len(cameras)} views each, {size} pixels"
    )
    return statistics_of(np.concatenate(features), judge.name, judge.fingerprint(), what)


@torch.no_grad()
def _features(judge: ClipJudge, cameras: Cameras, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yields features of each subject's views; each shape is rendered once."""
    parts = [cameras[start : start + _BATCH] for start in range(0, len(cameras), _BATCH)]
    with tqdm(total=len(SHAPES) * len(COLOURS), desc="reference", unit="subject") as bar:
        for shape in SHAPES:
            shaded = torch.cat([render_shading(shape, part, size, size) for part in parts])
            for colour in COLOURS.values():
                views = colourize(shaded, torch.tensor(colour)).clamp(0, 1)
                batches = [judge.image_features(batch) for batch in views.split(_BATCH)]
                yield torch.cat(batches).cpu().numpy()
                bar.update()
