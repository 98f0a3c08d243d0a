"""Judges finished runs as in the paper: views all around are matched to the prompts of all runs.

R-precision and the Frechet distance use CLIP (in the paper CLIP-B/32). If the built-in world has the object of a run,
PSNR and SSIM against the true views are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.evaluate.figures import Figures, Judged
from picardopt_3d.evaluate.frechet import Statistics, frechet_distance, statistics_of
from picardopt_3d.evaluate.prompts import meaning_of
from picardopt_3d.evaluate.protocol import USUAL_SIZE, Protocol
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.finished import FinishedRun, open_scene
from picardopt_3d.scenes import WHITE


def judge_runs(
    runs: Sequence[FinishedRun],
    judge: ClipJudge,
    prompts: Sequence[str],
    protocol: Protocol | None = None,
    reference: Statistics | None = None,
) -> list[Judged]:
    """Judges runs, one after the other.

    Args:
        runs: The runs.
        judge: The model that matches pictures to prompts and computes the features for the Frechet distance.
        prompts: The prompts to choose from; R-precision needs at least two.
        protocol: Cameras, size and background of the pictures.
        reference: Statistics of the reference pictures; None: no Frechet distance.
    """
    protocol = protocol or Protocol()
    texts = judge.text_features(prompts) if len(prompts) > 1 else None
    found = []
    with tqdm(total=len(runs) * protocol.views, desc="judging", unit="view") as bar:
        for run in runs:
            bar.set_postfix_str(run.folder.name, refresh=False)
            found.append(_judge(run, judge, prompts, texts, protocol, reference, bar.update))
    return found


def _judge(
    run: FinishedRun,
    judge: ClipJudge,
    prompts: Sequence[str],
    texts: torch.Tensor | None,
    protocol: Protocol,
    reference: Statistics | None,
    progress: Callable[[int], object],
) -> Judged:
    """Judges one run."""
    report = run.report
    size = protocol.size or int(report.get("size") or USUAL_SIZE)
    background = WHITE if protocol.background == "white" else None
    cameras = protocol.cameras(run.view)
    scene = open_scene(run.scene, protocol.device)
    with _naming(run):
        views = render_rgb(scene, cameras, size, background, progress)
        features = judge.image_features(views)
        table = features.cpu().numpy().astype(np.float64)
        distance = None
        if reference is not None:
            distance = frechet_distance(statistics_of(table), reference)
    right = None
    if texts is not None and run.prompt is not None:
        right = r_precision(features, texts, prompts, run.prompt)
    near = alike = None
    if run.yardstick is not None:
        near, alike = run.yardstick.compare(views, cameras)
    figures = Figures(
        name=str(run.folder),
        runs=1,
        prompt=run.prompt,
        method=report.get("method"),
        preset=report.get("preset"),
        seed=report.get("seed"),
        views=len(views),
        r_precision=right,
        frechet=distance,
        psnr=near,
        ssim=alike,
        steps=report.get("steps_done", report.get("steps")),  # "steps_done" of a stopped run
        sweeps=report.get("sweeps"),
        mean_stride=report.get("mean_stride"),
        drift_evaluations=report.get("drift_evaluations"),
        seconds=run.seconds,
        seconds_with_startup=run.seconds_with_startup,
    )
    return Judged(run, figures, table)


def r_precision(
    features: torch.Tensor, texts: torch.Tensor, prompts: Sequence[str], own: str
) -> float:
    """Returns the share of the pictures whose own prompt fits best.

    Prompts that name the same subject of the built-in world in other words count as the same.

    Args:
        features: Features of the pictures, `[pictures, features]`.
        texts: Unit embeddings of the prompts, `[prompts, features]`.
        prompts: The prompts to choose from.
        own: The pictures' own prompt.
    """
    best = (functional.normalize(features, dim=-1) @ texts.T).argmax(-1)
    right = torch.tensor([meaning_of(prompt) == meaning_of(own) for prompt in prompts])
    return float(right[best.cpu()].double().mean())


@contextlib.contextmanager
def _naming(run: FinishedRun) -> Iterator[None]:
    """Adds the run's folder to errors that occur while it is judged."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{run.folder}: {error}") from error
