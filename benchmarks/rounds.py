"""How many steps a sweep makes final, how far that leads from the sequential run, and what it costs in quality.

    python benchmarks/rounds.py                  # everything, or what is missing of it
    python benchmarks/rounds.py --guidance exact # the part that needs no diffusion model
    python benchmarks/rounds.py --only "drift"   # only runs whose names hold this
    python benchmarks/rounds.py --render         # write the table of the runs that are there

Every trial is run for every seed, and compared with the sequential run of the same seed. Each run is kept in the
JSON as it ends, so that the benchmark goes on where it was stopped; runs with other weights of the guidance model
need another JSON. A window's drifts are evaluated one after the other here (the serial engine): strides, deviations
and PSNR are those of any number of workers, only the time is not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from picardopt_3d.guidance.embeddings import identity
from picardopt_3d.guidance.pixel_diffusion import SHIPPED
from picardopt_3d.io import replacing
from picardopt_3d.methods import Context
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.run.loop import closure_of
from picardopt_3d.scenes import load_scene, save_scene
from picardopt_3d.world import parse_prompt
from picardopt_3d.world.yardstick import psnr_against_truth
from plain_loop import sequential_step
from result_store import ResultStore
from small_scenes import distances, guidance_of
from tables import markdown, number

from picardopt import (
    AdaptiveTolerance,
    DriftTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
)

SETTINGS = {"easy": (2, 0.02), "rough": (4, 0.05)}
"""Batch and learning rate."""
WINDOWS = (8, 16, 32, 64)
RULES = {
    "drift error": lambda: DriftTolerance(),
    "the paper's adaptive rule": lambda: AdaptiveTolerance(),
    "step-relative 2, distance 0.2": lambda: StepRelativeTolerance(2, distance=0.2),
    "accept everything": lambda: math.inf,
}
GUIDANCES = ("exact", "diffusion")
PREDICTORS = ("coast", "hold")
HELD = ("the paper's adaptive rule",)
"""The rules that are tried with `hold` as well; with `coast` all are."""


@dataclass(frozen=True)
class Run:
    """One run; `rule` None is the sequential one."""

    guidance: str
    setting: str
    seed: int
    rule: str | None = None
    predictor: str = ""
    window: int = 1

    @property
    def name(self) -> str:
        if self.rule is None:
            return f"{self.guidance}/{self.setting}/sequential/seed {self.seed}"
        trial = f"window {self.window}/{self.predictor}, {self.rule}"
        return f"{self.guidance}/{self.setting}/{trial}/seed {self.seed}"


def references(guidance: str, seeds: int) -> list[Run]:
    return [Run(guidance, setting, seed) for setting in SETTINGS for seed in range(seeds)]


def trials(guidance: str, seeds: int) -> list[Run]:
    """The grid, line by line of the table, long runs first, so that the processes end together."""
    grid = itertools.product(lines(), reversed(SETTINGS), reversed(WINDOWS), range(seeds))
    return [Run(guidance, setting, seed, rule, p, w) for (p, rule), setting, w, seed in grid]


def lines() -> list[tuple[str, str]]:
    """Predictor and rule of each line of the table."""
    both = itertools.product(PREDICTORS, RULES)
    return [(p, rule) for p, rule in both if p == "coast" or rule in HELD]


def scene_file(folder: Path, run: Run) -> Path:
    return folder / f"{run.guidance}-{run.setting}-{run.seed}.safetensors"


def optimize(run: Run, prompt: str, steps: int, folder: Path) -> dict[str, Any]:
    """Carry out one run in this process; a reference keeps its scene, a trial is compared with it."""
    torch.set_num_threads(1)
    batch, rate = SETTINGS[run.setting]
    recipe = replace(SMALL, steps=steps, batch=batch, rates=field_rates(encoding=rate))
    guidance = guidance_of(run.guidance, prompt)
    asked = recipe.guidance.text_prompt(prompt)
    stage = recipe.build(Context(guidance, asked, torch.device("cpu")))
    (base,) = stage.optimizers()
    begin = time.perf_counter()
    figures: dict[str, Any] = {}
    if run.rule is None:
        for step in range(steps):
            sequential_step(stage, run.seed, step)
        with replacing(scene_file(folder, run)) as temporary:
            save_scene(stage.scene, temporary)
    else:
        optimizer = ParallelPicardOptimizer(
            base,
            window=run.window,
            tolerance=RULES[run.rule](),
            predictor=run.predictor,
            total_steps=steps,
            seed=run.seed,
            audit="never",
        )
        closure = closure_of(stage)
        for _ in range(steps):
            optimizer.step(closure)
        stats = optimizer.stats
        figures = {
            "sweeps": stats.sweeps,
            "steps_per_sweep": steps / stats.sweeps,
            "accepted": steps / stats.drift_evaluations,
            "strides": stats.strides,
        }
        sequential = load_scene(scene_file(folder, Run(run.guidance, run.setting, run.seed)))
        figures |= distances(stage.scene, sequential, recipe.final_pixels)
    subject = parse_prompt(prompt)
    assert subject is not None
    figures["psnr"] = psnr_against_truth(stage.scene, subject, recipe.final_pixels)
    figures["seconds"] = time.perf_counter() - begin
    return figures


def spread(folder: Path, guidance: str, setting: str, seeds: int) -> dict[str, float]:
    """Median distance between the sequential runs of two seeds."""
    scenes = [load_scene(scene_file(folder, Run(guidance, setting, seed))) for seed in range(seeds)]
    pairs = [distances(a, b, 32) for a, b in itertools.combinations(scenes, 2)]
    return {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}


def carry_out(task: tuple[Run, str, int, Path]) -> tuple[str, dict[str, Any]]:
    run, *rest = task
    return run.name, optimize(run, *rest)


def percent(value: float) -> str:
    return "inf" if math.isinf(value) else number(100 * value)


def table(runs: dict[str, Any], guidance: str, seeds: int) -> str:
    """Steps a sweep and slots accepted @ deviations, and PSNR, a column for each setting and window."""
    columns = list(itertools.product(SETTINGS, WINDOWS))
    rows: list[list[str]] = []
    for predictor, rule in lines():
        row = [f"{predictor}, {rule}"]
        for setting, window in columns:
            found = seeds_of(runs, Run(guidance, setting, 0, rule, predictor, window), seeds)
            between = runs.get(f"{guidance}/{setting}/spread")
            if not found or not between:
                row.append("")
                continue
            mean = {key: statistics.fmean(each[key] for each in found) for key in MEANS}
            apart = [mean[key] / between[key] for key in ("parameters", "pictures")]
            missing = "" if len(found) == seeds else f" [{len(found)}/{seeds}]"
            row.append(
                f"{mean['steps_per_sweep']:.2f} ({100 * mean['accepted']:.0f} %) @ "
                f"{percent(apart[0])} / {percent(apart[1])}; {mean['psnr']:.2f} dB{missing}"
            )
        if any(row[1:]):
            rows.append(row)
    last = ["sequential (mean of the seeds)"]
    for setting, _ in columns:
        names = [Run(guidance, setting, seed).name for seed in range(seeds)]
        values = [runs[name]["psnr"] for name in names if name in runs]
        last.append(f"1.00; {statistics.fmean(values):.2f} dB" if values else "")
    head = ["predictor, rule", *(f"{setting} {window}" for setting, window in columns)]
    return f"## {guidance}\n\n" + markdown(head, [*rows, last])


def seeds_of(runs: dict[str, Any], run: Run, seeds: int) -> list[dict[str, Any]]:
    """What was found of a trial, for each of its seeds that was run."""
    names = [replace(run, seed=seed).name for seed in range(seeds)]
    return [runs[name] for name in names if name in runs]


MEANS = ("steps_per_sweep", "accepted", "parameters", "pictures", "psnr")

NOTES = """
{remark}
Each cell: steps a sweep (share of the evaluated slots that were accepted) @ deviation of the parameters
/ of the pictures from the sequential run of the same seed, in % of the median distance between the
sequential runs of two seeds; PSNR of the held-out views against the true ones; means over
{seeds} seeds; [1/{seeds}]: over one of them. *Easy* is batch 2 and learning rate 0.02, *rough* is batch 4 and 0.05;
the number is the window. The whole run is {steps} steps of {prompt!r}. *exact* is the closed-form score of the
prompt's shape in all colours, *diffusion* the pixel model that shipped when this was measured. Deviations are those
of the end of the run.
"""


def body(content: dict[str, Any]) -> tuple[str, str]:
    """Notes and tables, from the content of the JSON alone."""
    setup = content["setup"]
    found = [name for name in GUIDANCES if any(run.startswith(name) for run in content["runs"])]
    tables = [table(content["runs"], guidance, setup["seeds"]) for guidance in found]
    return NOTES.format(remark=content.get("remark", ""), **setup), "\n\n".join(tables)


def weights() -> str:
    """A name for the weights of the guidance model, which changes when they do."""
    return identity(SHIPPED, ("unet", "text_encoder"))[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--guidance", choices=GUIDANCES, nargs="+", default=list(GUIDANCES))
    parser.add_argument("--prompt", default="a red cube")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rounds.json"))
    parser.add_argument("--scenes", type=Path, default=Path("build/rounds"))
    parser.add_argument("--only", default="", help="run only trials whose name holds this")
    parser.add_argument("--render", action="store_true", help="run nothing, write the document")
    options = parser.parse_args()
    title = "Steps per sweep, deviation from the sequential run, quality"
    if options.render:
        setup = json.loads(options.out.read_text())["setup"]
        ResultStore(options.out, "", setup, title, body).write()
        return
    if options.seeds < 2:
        parser.error(
            f"--seeds {options.seeds}: deviations are measured against the distance of two"
        )
    if parse_prompt(options.prompt) is None:
        parser.error(f"--prompt {options.prompt!r}: name a built-in shape and colour")
    command = "python benchmarks/rounds.py" + "".join(
        f" --{name} {getattr(options, name)}" for name in ("steps", "seeds", "processes")
    )
    setup = {key: getattr(options, key) for key in ("prompt", "steps", "seeds")}
    setup["weights"] = weights()

    def said(found: dict[str, Any]) -> str:
        return f"{found.get('steps_per_sweep', 1):.2f} steps a sweep, {found['seconds']:.0f} s"

    kept = ResultStore(options.out, command, setup, title, body)
    options.scenes.mkdir(parents=True, exist_ok=True)

    def carry_out_all(wanted: list[Run]) -> None:
        tasks = [
            (run.name, (run, options.prompt, options.steps, options.scenes))
            for run in wanted
            if run.rule is None or options.only in run.name
        ]
        kept.carry_out(carry_out, tasks, options.processes, said)

    for guidance in options.guidance:
        for run in references(guidance, options.seeds):
            if not scene_file(options.scenes, run).exists():
                kept.runs.pop(run.name, None)  # its scene is needed, and is not committed
        carry_out_all(references(guidance, options.seeds))
        for setting in SETTINGS:
            between = spread(options.scenes, guidance, setting, options.seeds)
            kept.runs[f"{guidance}/{setting}/spread"] = between
        carry_out_all(trials(guidance, options.seeds))
    kept.write()
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
