"""The command `picardopt evaluate`, which measures the quality of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from picardopt_3d.cli_errors import cli_errors, options_of

if TYPE_CHECKING:
    from picardopt_3d.evaluate.clip import ClipJudge

SHIPPED = "shipped"


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of `picardopt evaluate`.

    Attributes:
        runs: Folders of finished runs.
        csv: A CSV file for the table in full precision; None: print it only.
        clip: The judge: "shipped" (knows the built-in world only), or the folder or hub id of a CLIPModel, such as
            openai/clip-vit-base-patch32, which the paper used.
        prompts: Prompts to choose from besides those of the runs: a text file with one per line, or "domain" for the 64
            captions of the built-in world.
        fid_reference: The reference for the Frechet distance of CLIP features between sets of pictures: a folder of
            pictures, or an npz file from `make_reference`.
        make_reference: Write the npz file of a reference instead of judging runs: a folder of pictures (in the paper,
            ImageNet-2012's validation pictures), or "domain" for true views of the built-in world.
        out: The npz file to write, with `make_reference`.
        views: Number of pictures of each run, evenly around the object.
        elevation: Elevation of the camera above the horizon, degrees.
        distance: Distance of the camera from the center, scene units; None: the middle of the run's training cameras.
        fov: Vertical field of view of the camera, degrees; None: the middle of the run's training cameras.
        size: Pixels along each edge of a picture; None: as in the run's own final views (64 in a reference).
        background: Background of the object: "white", or the "scene"'s own.
        group_by: Entries of report.json; runs with equal entries are averaged below the table.
        device: Device of scenes and judge: "auto" (an accelerator if there is one), "cpu" or "cuda".
    """

    runs: Positional[tuple[Path, ...]] = ()
    csv: Path | None = None
    clip: str = SHIPPED
    prompts: str | None = None
    fid_reference: Path | None = None
    make_reference: str | None = None
    out: Path | None = None
    views: int = 120
    elevation: float = 12.0
    distance: float | None = None
    fov: float | None = None
    size: int | None = None
    background: Literal["white", "scene"] = "white"
    group_by: tuple[str, ...] = ("method", "preset")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: An option is out of range, or two exclude each other; the message names the remedy.
        """
        for name, least in (("views", 2), ("size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give at least {least}")
        limits = {"elevation": (-90, 90), "distance": (0, float("inf")), "fov": (0, 180)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            allowed = (
                value is None or low < value < high or (name == "elevation" and abs(value) == 90)
            )
            if not allowed:
                raise ValueError(f"{name}={value}: give a number between {low} and {high}")
        if self.make_reference is None:
            if not self.runs:
                raise ValueError("no runs: give the folders of finished runs")
            if self.out is not None:
                raise ValueError(
                    f"out={str(self.out)!r} is for a reference only: write the table with --csv FILE"
                )
        elif self.out is None:
            raise ValueError(
                f"make_reference={self.make_reference!r} without out: give the file to write with --out FILE.npz"
            )
        elif self.runs:
            raise ValueError(
                f"make_reference={self.make_reference!r} with runs: write the reference first, then judge the runs "
                f"with --fid-reference"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt evaluate`; None: those of this process.

    Raises:
        SystemExit: 2 if the arguments or the runs cannot be used, 130 after Ctrl-C.
    """
    with cli_errors("evaluate"):
        described = "Judge finished runs by CLIP, and by the true views where these are known."
        config = options_of(EvaluateConfig, "evaluate", argv, described)
        if config.make_reference is not None:
            _make_reference(config, config.make_reference)
        else:
            _evaluate(config)


def _evaluate(config: EvaluateConfig) -> None:
    """Judges the runs, prints the table and its notes, and writes the CSV."""
    # Imported here because these take seconds to import, which a mistyped option should not wait for.
    from picardopt_3d.evaluate.figures import group
    from picardopt_3d.evaluate.judging import judge_runs
    from picardopt_3d.evaluate.prompts import gather_prompts, read_prompts
    from picardopt_3d.evaluate.protocol import Protocol
    from picardopt_3d.evaluate.reference import find_reference
    from picardopt_3d.evaluate.table import text_table, write_csv
    from picardopt_3d.run.finished import read_run
    from picardopt_3d.task import yardstick_of

    runs = [read_run(folder) for folder in dict.fromkeys(config.runs)]
    more = [] if config.prompts is None else read_prompts(config.prompts)
    judge = _judge(config)
    reference = None
    if config.fid_reference is not None:
        reference = find_reference(judge, config.fid_reference)
    prompts = gather_prompts(runs, more)
    names = ("views", "elevation", "distance", "fov", "size", "background", "device")
    protocol = Protocol(**{name: getattr(config, name) for name in names})
    judged = judge_runs(runs, judge, prompts, protocol, reference)
    lines = [one.figures for one in judged] + group(judged, config.group_by, reference)
    print(text_table(lines))
    print(
        f"\n{config.views} views of each run at {config.elevation:g} degrees, judged by {judge.name}",
        end="",
    )
    if len(prompts) > 1:
        print(f" among {len(prompts)} prompts")
    else:
        print("; no R-precision: there is only one prompt to choose (add runs or --prompts)")
    if config.clip == SHIPPED and any(yardstick_of(prompt) is None for prompt in prompts):
        print(
            "  the shipped judge knows only the built-in world: its figures for other prompts mean nothing; "
            "give another judge with --clip"
        )
    if reference is not None:
        print(f"Frechet distance to {reference.source} ({reference.count} pictures)")
        if min(reference.count, config.views) <= len(reference.mean):
            print(
                f"  {len(reference.mean)} features: with so few pictures distances are too large; "
                f"compare equal numbers of pictures only"
            )
    if config.csv is not None:
        write_csv(lines, config.csv)
        print(f"written to {config.csv}")


def _make_reference(config: EvaluateConfig, source: str) -> None:
    """Writes the statistics of a reference."""
    from picardopt_3d.evaluate.frechet import save_statistics
    from picardopt_3d.evaluate.prompts import WORLD
    from picardopt_3d.evaluate.protocol import USUAL_SIZE, Protocol
    from picardopt_3d.evaluate.reference import folder_statistics

    out = config.out
    if out is None or out.suffix != ".npz":
        raise ValueError(f"out={str(out)!r}: give a file that ends in .npz")
    if source != WORLD and not Path(source).is_dir():  # before the judge is loaded
        raise FileNotFoundError(
            f"make_reference={source!r}: there is no such folder; give a folder of pictures, or {WORLD!r}"
        )
    judge = _judge(config)
    if source == WORLD:
        from picardopt_3d.world.statistics import world_statistics

        protocol = Protocol(config.views, config.elevation, config.distance, config.fov)
        cameras = protocol.cameras()
        statistics = world_statistics(judge, cameras, config.size or USUAL_SIZE)
    else:
        statistics = folder_statistics(judge, Path(source))
    save_statistics(statistics, out)
    print(
        f"{out}: {statistics.count} pictures ({statistics.source}), {len(statistics.mean)} features of "
        f"{judge.name}"
    )


def _judge(config: EvaluateConfig) -> ClipJudge:
    """Returns the judge that the options name."""
    from transformers.utils import logging

    from picardopt_3d.devices import pick_device
    from picardopt_3d.evaluate.clip import SHIPPED_CLIP, ClipJudge

    logging.disable_progress_bar()  # only the progress of the pictures is shown
    source = SHIPPED_CLIP if config.clip == SHIPPED else config.clip
    return ClipJudge(source, (), device=pick_device(config.device))
