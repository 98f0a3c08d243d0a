"""Finished runs, judged as in the paper: views all around, each against its own prompt among those of all runs.

120 azimuths at 12 degrees of elevation; R-precision and the Frechet distance by CLIP (the paper: CLIP-B/32
for both). Where a run's subject is one of the built-in world's, PSNR and SSIM against the true views are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from ..cameras import Cameras, turntable_cameras
from ..domain import BACKGROUND, all_subjects, parse_prompt
from .clip import ClipJudge
from .frechet import Statistics, frechet_distance, statistics_of
from .pictures import psnr, render_views, ssim, true_views
from .reference import DOMAIN
from .runs import SCENE_FILE, Run, open_scene

USUAL_SIZE = 64
"""Pixels of the pictures of a run whose report does not say."""

USUAL_VIEW = (1.65, 42.5)
"""Distance and vertical field of view (degrees) of its cameras: the built-in world's."""


@dataclass(frozen=True)
class Figures:
    """One line of the table: of a run, or the mean of a group of runs.

    Attributes:
        name: The run's folder, or what the group has in common.
        runs: How many runs it stands for.
        prompt: What the pictures are to be recognised as; None: nothing is known, or several.
        method: As the report has it.
        preset: As the report has it.
        seed: Of the run; None of a group.
        views: Pictures that were judged.
        r_precision: Share of the pictures whose own prompt fits best.
        frechet: Distance between the pictures and the reference; of a group, between all its pictures together.
        psnr: Against the true views, dB.
        ssim: Against the true views.
        steps: Optimizer steps that were taken.
        sweeps: Parallel evaluations of a window.
        mean_stride: Steps that a sweep made final.
        drift_evaluations: Gradients that were computed.
        seconds: Of the optimization alone.
        seconds_with_startup: From the command to the end of the optimization.
    """

    name: str
    runs: int
    prompt: str | None
    method: str | None
    preset: str | None
    seed: int | None
    views: int
    r_precision: float | None
    frechet: float | None
    psnr: float | None
    ssim: float | None
    steps: float | None
    sweeps: float | None
    mean_stride: float | None
    drift_evaluations: float | None
    seconds: float | None
    seconds_with_startup: float | None


@dataclass(frozen=True, eq=False)
class Judged:
    """What was found of one run.

    Attributes:
        run: Whose.
        figures: Its line of the table.
        features: Of its pictures. [views, features]
    """

    run: Run
    figures: Figures
    features: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Protocol:
    """How pictures are taken.

    Attributes:
        views: Azimuths, evenly around.
        elevation: Degrees above the horizon.
        distance: From the origin, scene units; None: in the middle of where the run was trained to look from.
        fov: Vertical field of view, degrees; None: the same.
        size: Pixels along each edge; None: those of the run's own final views.
        background: Behind the object: "white", so that objects are judged and not what is behind them, or the
            "scene"'s own.
        device: Where scenes are rendered.
    """

    views: int = 120
    elevation: float = 12.0
    distance: float | None = None
    fov: float | None = None
    size: int | None = None
    background: Literal["white", "scene"] = "white"
    device: str = "auto"

    def cameras(self, view: tuple[float, float] | None = None) -> Cameras:
        """Where from.

        Args:
            view: Distance and field of view of a run; None: those of the built-in world.
        """
        usual = view or USUAL_VIEW
        distance, fov = (
            own if given is None else given
            for given, own in zip((self.distance, self.fov), usual, strict=True)
        )
        return turntable_cameras(self.views, self.elevation, distance, fov)


def gather_prompts(runs: Sequence[Run], more: Sequence[str] = ()) -> list[str]:
    """The prompts that pictures choose from: those of all runs, then others, each meaning once."""
    first: dict[str, str] = {}
    for prompt in [*(run.prompt for run in runs if run.prompt is not None), *more]:
        first.setdefault(_meaning(prompt), prompt)
    return list(first.values())


def read_prompts(source: str) -> list[str]:
    """Prompts from a file, one a line ("#" begins a comment), or those of the built-in world.

    Args:
        source: A text file, or "domain" for the 64 captions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no prompt in it, or is no text.
    """
    if source == DOMAIN:
        return [subject.caption for subject in all_subjects()]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={source!r}: there is no such file; give a text file with a prompt a line, or {DOMAIN!r}"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={source!r} is no text file: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts={source!r} has no prompt in it: write one a line")
    return prompts


def evaluate(
    runs: Sequence[Run],
    judge: ClipJudge,
    prompts: Sequence[str],
    protocol: Protocol | None = None,
    reference: Statistics | None = None,
) -> list[Judged]:
    """Judge runs, one after the other.

    Args:
        runs: Which.
        judge: Decides which prompt fits; its features are compared with the reference's.
        prompts: To choose from. With fewer than two there is nothing to choose, and no R-precision.
        protocol: How pictures are taken.
        reference: What sets of pictures are compared with; None: no Frechet distance.
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
    run: Run,
    judge: ClipJudge,
    prompts: Sequence[str],
    texts: torch.Tensor | None,
    protocol: Protocol,
    reference: Statistics | None,
    progress: Callable[[int], object],
) -> Judged:
    """Judge one run."""
    report = run.report
    size = protocol.size or int(report.get("size") or USUAL_SIZE)
    backdrop = BACKGROUND if protocol.background == "white" else None
    cameras = protocol.cameras(run.view)
    scene = open_scene(run.folder / SCENE_FILE, protocol.device)
    with _told(run):
        views = render_views(scene, cameras, size, backdrop, progress)
        features = judge.image_features(views)
        table = features.cpu().numpy().astype(np.float64)
        distance = None
        if reference is not None:
            distance = frechet_distance(statistics_of(table), reference)
    right = None
    if texts is not None and run.prompt is not None:
        right = r_precision(features, texts, prompts, run.prompt)
    near = alike = None
    if run.subject is not None:
        truth = true_views(run.subject, cameras, size)
        near, alike = psnr(views, truth), ssim(views, truth)
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
        steps=report.get("steps_done", report.get("steps")),  # of a stopped run, those done
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
    """Share of the pictures whose own prompt fits best.

    Prompts that name the same subject of the built-in world in other words count as the same.

    Args:
        features: Of the pictures. [pictures, features]
        texts: Unit embeddings of the prompts. [prompts, features]
        prompts: To choose from.
        own: The pictures' own one.
    """
    best = (functional.normalize(features, dim=-1) @ texts.T).argmax(-1)
    right = torch.tensor([_meaning(prompt) == _meaning(own) for prompt in prompts])
    return float(right[best.cpu()].double().mean())


def group(
    judged: Sequence[Judged], keys: Sequence[str], reference: Statistics | None = None
) -> list[Figures]:
    """The mean of each group of runs that have some entries of their reports in common.

    Args:
        judged: The runs.
        keys: Names of entries, such as "method" and "preset".
        reference: What all pictures of a group together are compared with.

    Returns:
        In order of appearance; groups of one run are left out, the run's own line says it.
    """
    members: dict[tuple[str, ...], list[Judged]] = {}
    for one in judged:
        values = tuple(str(one.run.report.get(key, "-")) for key in keys)
        members.setdefault(values, []).append(one)
    return [
        _mean(" ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)), some, reference)
        for values, some in members.items()
        if len(some) > 1
    ]


def _mean(name: str, judged: Sequence[Judged], reference: Statistics | None) -> Figures:
    lines = [one.figures for one in judged]

    def mean(entry: str) -> float | None:
        """Over those runs that have it; R-precision counts pictures, of which each run has as many."""
        values: list[Any] = [getattr(line, entry) for line in lines]
        known = [float(value) for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def common(entry: str) -> Any:
        values = {getattr(line, entry) for line in lines}
        return values.pop() if len(values) == 1 else None

    distance = None
    if reference is not None:
        together = np.concatenate([one.features for one in judged])
        distance = frechet_distance(statistics_of(together), reference)
    averaged = ["r_precision", "psnr", "ssim", "steps", "sweeps", "mean_stride"]
    averaged += ["drift_evaluations", "seconds", "seconds_with_startup"]
    means: dict[str, Any] = {entry: mean(entry) for entry in averaged}
    return Figures(
        name=f"mean of {len(lines)}" + (f": {name}" if name else ""),
        runs=len(lines),
        views=sum(line.views for line in lines),
        frechet=distance,
        **{entry: common(entry) for entry in ("prompt", "method", "preset", "seed")},
        **means,
    )


def _meaning(prompt: str) -> str:
    """What two prompts have in common that say the same."""
    subject = parse_prompt(prompt)
    return " ".join(prompt.casefold().split()) if subject is None else subject.caption


@contextlib.contextmanager
def _told(run: Run) -> Iterator[None]:
    """Name the run in what goes wrong while its pictures are taken."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{run.folder}: {error}") from error
