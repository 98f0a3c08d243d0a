"""The methods on what ships: sequentially (two seeds), at tolerance 0, at the default, and by the paper's rule.

    python benchmarks/methods.py                 # everything, or what is missing of it

Every run is one of `picardopt text-to-3d` or `image-to-3d` without its film, in one process with one thread: the
window's drifts are evaluated one after the other, so everything but the time is the same for any number of workers.
Of a method with several stages each stage is measured, all of them at the size of the last one.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from method_runs import (
    MODES,
    RECIPES,
    Run,
    captions,
    configuration,
    stages_of,
    subject,
)
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.config import ImageTo3DConfig, RunConfig
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.images import save_reference
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import load_scene
from picardopt_3d.world import all_subjects
from picardopt_3d.world.pictures import true_reference
from picardopt_3d.world.yardstick import psnr_against_truth
from result_store import Figures, ResultStore
from safetensors.torch import load_file
from tables import markdown, mean

VIEWS, VIEW_SIZE, ELEVATION = 120, 64, 12.0
"""Azimuths that CLIP sees, their pixels, and their elevation, as in the paper."""


@cache
def judge() -> ClipJudge:
    """The shipped CLIP, over the captions of all 64 subjects."""
    return ClipJudge()


def optimize(task: tuple[Run, Path]) -> tuple[str, Figures]:
    """Carries out one run in this process, and evaluates its scene."""
    run, scenes = task
    config = configuration(run, scenes)
    config.out.mkdir(parents=True, exist_ok=True)
    if isinstance(config, ImageTo3DConfig):
        camera = orbit_cameras(config.elevation, config.azimuth)
        save_reference(true_reference(subject(run.caption), camera), config.image)
    begin = time.process_time()
    train(config, time.time())
    seconds = time.process_time() - begin
    return run.name, {"cpu_seconds": seconds} | figures(run, config)


def figures(run: Run, config: RunConfig[Any]) -> Figures:
    """What is found of a run: totals, the quality of its last stage, and of several stages the figures of each."""
    torch.set_num_threads(1)
    size = config.recipe.stages()[-1].config.final_pixels
    names = [stage.name for stage in config.recipe.stages()]
    other = RunFolder(run.sequential().folder(config.out.parents[2]))
    each: dict[str, Figures] = {}
    records = []
    for index, (name, folder) in enumerate(zip(names, RunFolder(config.out).begun(), strict=True)):
        records.append(RunRecord.load(folder))
        each[name] = counted(records[-1]) | {"seconds": records[-1].seconds}
        each[name] |= quality(run, folder, size)
        if not config.sequential and len(other.begun()) > index:
            each[name]["bitwise"] = same_bits(folder, other.begun()[index])
    last = each[names[-1]]
    total = counted(RunRecord.of_stages(records))
    total |= {name: last[name] for name in ("psnr", "r_precision")}
    bits = [one["bitwise"] for one in each.values() if "bitwise" in one]
    if bits:
        total["bitwise"] = all(bits)
    return total | ({"stages": each, "size": size} if len(each) > 1 else {})


def counted(record: RunRecord) -> Figures:
    """Steps, and what they cost."""
    return {
        "steps_per_sweep": record.mean_stride,
        "drift_evaluations": record.drift_evaluations,
        "steps": record.step,
    }


def quality(run: Run, folder: StageFolder, size: int) -> Figures:
    """PSNR of held-out views, and R-precision as in the paper."""
    scene = load_scene(folder.scene)
    cameras = turntable_cameras(VIEWS, elevation=ELEVATION)
    chosen = judge().similarity(render_rgb(scene, cameras, VIEW_SIZE)).argmax(-1)
    right = [each.caption for each in all_subjects()].index(run.caption)
    return {
        "psnr": psnr_against_truth(scene, subject(run.caption), size),
        "r_precision": float((chosen == right).float().mean()),
    }


def same_bits(folder: StageFolder, other: StageFolder) -> bool:
    """Whether the scenes of two stages are equal."""
    own, kept = load_file(folder.scene), load_file(other.scene)
    return own.keys() == kept.keys() and all(torch.equal(own[name], kept[name]) for name in kept)


def body(content: Figures) -> tuple[str, str]:
    """Notes and tables of the document."""
    runs = content["runs"]
    heads = ["recipe", "mode", "PSNR, dB", "apart, dB", "R-precision", "steps a sweep"]
    heads += ["evaluations a step", "CPU seconds", "bitwise"]
    parts = [(recipe, stage) for recipe in RECIPES for stage in [*stages_of(recipe), ""]]
    rows = [row(runs, recipe, stage, mode) for recipe, stage in parts for mode in MODES]
    each = [
        [recipe, caption, *(cell(runs.get(Run(recipe, caption, mode).name)) for mode in MODES)]
        for recipe in RECIPES
        for caption in captions(recipe)
    ]
    singles = markdown(["recipe", "asked for", *MODES], each)
    return NOTES, f"{markdown(heads, rows)}\n\n## Each\n\n{singles}"


def row(runs: dict[str, Figures], recipe: str, stage: str, mode: str) -> list[str]:
    """Returns a row of the table: means over a recipe's runs, or over one stage of them."""

    def found(run: Run) -> Figures | None:
        whole = runs.get(run.name)
        stages = (whole or {}).get("stages", {})
        return stages.get(stage) if stage else whole

    asked = [Run(recipe, caption, mode) for caption in captions(recipe)]
    pairs = [(found(run), found(run.sequential())) for run in asked]
    own = [one for one, _ in pairs if one]
    steps = [one["steps"] for one in own]
    apart = [abs(one["psnr"] - other["psnr"]) for one, other in pairs if one and other]
    bits = [one["bitwise"] for one in own if "bitwise" in one]
    evaluations = [one["drift_evaluations"] / n for one, n in zip(own, steps, strict=True)]
    return [
        f"{recipe}: {stage}" if stage else recipe,
        mode,
        mean(one["psnr"] for one in own),
        mean(apart),
        mean((100 * one["r_precision"] for one in own), "{:.0f} %"),
        mean(one["steps_per_sweep"] for one in own),
        mean(evaluations),
        mean((one["cpu_seconds"] for one in own if not stage), "{:.0f}"),
        f"{sum(bits)}/{len(bits)}" if bits else "",
    ]


def cell(found: Figures | None) -> str:
    """Returns one run's figures in short."""
    if found is None:
        return ""
    stages = found.get("stages", {"": found}).values()
    psnrs = ", ".join(f"{stage['psnr']:.1f}" for stage in stages)
    seen = f"{psnrs} dB, {100 * found['r_precision']:.0f} %"
    return f"{seen}, {found['steps_per_sweep']:.1f}"


NOTES = """
Each method's `small` preset with the models that ship (and DreamFusion's `small-nerf`, its radiance field),
seed 0, five texts or five pictures of the built-in world. *Another seed* is sequential too, with seed 1:
how far apart two runs are that differ by nothing but chance. *Tolerance 0* has a window of 2 (a wider one
changes nothing but the work that is thrown away), *default* is what a recipe does of itself with a window of 8:
the optimizer's default tolerance, or for `textmesh` and `prolificdreamer` its own numbers of it; *step-relative* is
`StepRelativeTolerance`, the default of earlier versions (measured then; the LoRA of `prolificdreamer` was not
judged in those runs); *the paper's rule* the method's row of Tables 3 and 4: window 7, adaptive tolerance, `hold`
(measured then, too, but for `prolificdreamer`, whose LoRA is judged with the scene). *PSNR*: 32 held-out views
against the true ones; *apart*: mean absolute difference from the sequential run's.
*R-precision*: the share of 120 azimuths at 12 degrees whose own caption the shipped CLIP prefers to those
of the 63 others. *Steps a sweep* is the ceiling of the speed-up by as many devices as the window is wide.
*CPU seconds* are of one process that evaluates its window's slots one after the other, on a machine with
other work on it. *Bitwise*: runs whose scene has the sequential run's bits. Of a method with several stages
each stage has a row, at the pixels of the last one, and the row without a stage counts all of them.
`dreamgaussian` and `dreamgaussian-image` are its first stage. In the second table: PSNR (after each stage),
R-precision, steps a sweep.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods.json"))
    parser.add_argument("--scenes", type=Path, default=Path("build/methods"))
    options = parser.parse_args()
    command = f"python benchmarks/methods.py --processes {options.processes}"
    kept = ResultStore(options.out, command, {"views": VIEWS}, "The methods on what ships", body)
    # What is compared with the sequential runs comes after them; tolerance 0, which costs most, last.
    for wanted in (
        ("sequential", "another seed"),
        ("default", "step-relative", "the paper's rule", "tolerance 0"),
    ):
        tasks = [
            (run.name, (run, options.scenes))
            for mode in wanted
            if mode in options.modes
            for recipe in options.recipes
            for run in (Run(recipe, caption, mode) for caption in captions(recipe))
        ]
        kept.carry_out(optimize, tasks, options.processes, cell)
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
