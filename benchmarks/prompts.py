"""Text-to-3D over many prompts and seeds: quality, and how much Picard iteration changes it.

    python benchmarks/prompts.py                 # everything, or what is missing of it

Ten prompts and five seeds are run three times each: sequentially, by Picard iteration at tolerance 0, and at the
default tolerance. All other prompts of the built-in world are run once, at the defaults. Every run is kept in the
JSON as it ends, so that the benchmark goes on where it was stopped. The window's drifts are evaluated one after the
other here (the serial engine): everything but the time is the same for any number of workers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.io import replacing
from picardopt_3d.methods import Context
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.run.loop import closure_of
from picardopt_3d.scenes import Scene, load_scene, save_scene
from picardopt_3d.world import COLOURS, SHAPES, all_subjects, held_out_subjects, parse_prompt
from picardopt_3d.world.yardstick import psnr_against_truth
from plain_loop import sequential_step
from result_store import ResultStore
from rounds import distances, guidance_of
from safetensors.torch import load_file, save_file
from tables import markdown

from picardopt import ParallelPicardOptimizer

HELD_OUT = tuple(subject.caption for subject in held_out_subjects())
PROMPTS = (
    "a orange sphere",
    "a red cube",
    "a purple cylinder",
    "a yellow cone",
    "a blue chair",
    "a cyan mug",
    "a green snowman",
    "a brown torus",
    "a red chair",
    "a yellow snowman",
)
"""Every shape and every colour; the last three are held out of the training of the guidance model."""
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "tolerance 0": {"window": 2, "tolerance": 0},
    "default": {"window": 8},
}
"""What the optimizer is given. At tolerance 0 a wider window changes nothing but the work that is thrown away."""
VIEWS, VIEW_SIZE = 8, 64
"""Azimuths that CLIP sees, and their pixels."""


@dataclass(frozen=True)
class Run:
    """One run."""

    prompt: str
    seed: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.prompt}/seed {self.seed}/{self.kind}"

    def file(self, folder: Path, ending: str) -> Path:
        """Where something of the run is kept."""
        return folder / f"{self.prompt.replace(' ', '-')}-{self.seed}-{self.kind}.{ending}"


def reference_of(run: Run) -> Run:
    """The sequential run of the same prompt and seed."""
    return Run(run.prompt, run.seed, "sequential")


@cache
def judge() -> ClipJudge:
    """One CLIP model a process, over the captions of all 64 subjects."""
    return ClipJudge()


def optimize(run: Run, steps: int, folder: Path) -> dict[str, Any]:
    """Carries out one run in this process; a sequential one saves what the others are compared with."""
    torch.set_num_threads(1)
    begin = time.process_time()
    guidance = guidance_of("diffusion", PROMPTS[0])  # the same model whatever the prompt
    asked = SMALL.guidance.text_prompt(run.prompt)
    recipe = replace(SMALL, steps=steps)
    stage = recipe.build(Context(guidance, asked, torch.device("cpu")))
    (base,) = stage.optimizers()
    figures: dict[str, Any] = {}
    if run.kind == "sequential":
        losses = [sequential_step(stage, run.seed, t) for t in range(steps)]
    else:
        options = KINDS[run.kind] | {"total_steps": steps, "seed": run.seed, "audit": "never"}
        optimizer = ParallelPicardOptimizer(base, **options)
        closure = closure_of(stage)
        losses = [optimizer.step(closure).total for _ in range(steps)]
        stats = optimizer.stats
        figures["steps_per_sweep"] = steps / stats.sweeps
        figures["accepted"] = steps / stats.drift_evaluations
    figures["optimization_cpu_seconds"] = time.process_time() - begin
    figures |= compared(run, stage.scene, end_of(stage.scene, base, losses), folder)
    return figures | quality(run.prompt, stage.scene)


def end_of(
    scene: Scene, base: torch.optim.Optimizer, losses: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Everything that has to be bitwise the same: parameters, the optimizer's state, all losses."""
    kept = {name: value.detach() for name, value in scene.named_parameters()}
    for name, parameter in scene.named_parameters():
        kept |= {f"{name}/{key}": value for key, value in base.state[parameter].items()}
    kept["losses"] = torch.stack([loss.detach() for loss in losses])
    return {name: value.clone().contiguous() for name, value in kept.items()}


def compared(run: Run, scene: Scene, end: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Saves a sequential run, or returns how far another one is from its sequential run, if there is one."""
    if run.kind == "sequential":
        with replacing(run.file(folder, "end.safetensors")) as temporary:
            save_file(end, temporary)
        with replacing(run.file(folder, "safetensors")) as temporary:
            save_scene(scene, temporary)
        return {}
    reference = reference_of(run)
    if not reference.file(folder, "safetensors").exists():
        return {}
    kept = load_file(reference.file(folder, "end.safetensors"))
    same = kept.keys() == end.keys() and all(
        torch.equal(kept[name].view(torch.int32), end[name].view(torch.int32)) for name in kept
    )
    sequential = load_scene(reference.file(folder, "safetensors"))
    return {"bitwise": same} | distances(scene, sequential, SMALL.final_pixels)


def quality(prompt: str, scene: Scene) -> dict[str, Any]:
    """PSNR of the held-out views against the true ones, and which caption CLIP chooses."""
    subject = parse_prompt(prompt)
    if subject is None:
        raise ValueError(f"prompt={prompt!r}: name a built-in shape and colour")
    with torch.no_grad():
        views = scene.render(turntable_cameras(VIEWS), VIEW_SIZE).rgb.clamp(0, 1)
    found = judge().similarity(views)
    captions = [subject.caption for subject in all_subjects()]
    right = captions.index(subject.caption)
    return {
        "psnr": psnr_against_truth(scene, subject, SMALL.final_pixels),
        "chosen": captions[int(found.mean(0).argmax())],
        "right": bool(found.mean(0).argmax() == right),
        "right_views": float((found.argmax(-1) == right).float().mean()),
    }


def carry_out(task: tuple[Run, int, Path]) -> tuple[str, dict[str, Any]]:
    run, *rest = task
    return run.name, optimize(run, *rest)


def spread(folder: Path, prompt: str, seeds: int) -> float | None:
    """Median distance between the parameters of the sequential runs of two seeds, if there are any."""
    files = [Run(prompt, s, "sequential").file(folder, "safetensors") for s in range(seeds)]
    scenes = [load_scene(file) for file in files if file.exists()]
    pairs = list(itertools.combinations(scenes, 2))
    size = SMALL.final_pixels
    found = [distances(a, b, size)["parameters"] for a, b in pairs]
    return statistics.median(found) if found else None


def mean(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Their mean, or nothing where there are none."""
    found = list(values)
    return form.format(statistics.fmean(found)) if found else ""


def count(values: Iterable[bool]) -> str:
    """How many of them are true, such as 5/5."""
    found = list(values)
    return f"{sum(found)}/{len(found)}" if found else ""


class Results:
    """The runs so far, and the figures made from them.

    Args:
        runs: From the JSON, by name.
        spreads: Of each prompt, from the JSON.
        seeds: How many there are.
    """

    def __init__(self, runs: dict[str, Any], spreads: dict[str, float], seeds: int) -> None:
        self.runs, self.spreads, self.seeds = runs, spreads, seeds

    def of(self, prompts: Iterable[str], kind: str, key: str) -> list[Any]:
        """One figure of all runs of a kind."""
        names = [Run(p, s, kind).name for p in prompts for s in range(self.seeds)]
        return [self.runs[n][key] for n in names if key in self.runs.get(n, {})]

    def once(self, prompts: Iterable[str], key: str) -> list[Any]:
        """One figure of the default run with seed 0 of each prompt."""
        names = [Run(p, 0, "default").name for p in prompts]
        return [self.runs[n][key] for n in names if n in self.runs]

    def differences(self, prompts: Iterable[str], kind: str) -> list[float]:
        """Absolute PSNR differences of the pairs."""
        pairs = [Run(p, s, kind) for p in prompts for s in range(self.seeds)]
        found = [(self.runs.get(r.name), self.runs.get(reference_of(r).name)) for r in pairs]
        return [abs(one["psnr"] - other["psnr"]) for one, other in found if one and other]

    def deviations(self, prompts: Iterable[str], kind: str) -> list[float]:
        """Deviations of the parameters in % of the spread of the seeds."""
        return [
            100 * apart / self.spreads[prompt]
            for prompt in prompts
            if prompt in self.spreads
            for apart in self.of([prompt], kind, "parameters")
        ]

    def row(self, name: str, prompts: tuple[str, ...]) -> list[str]:
        """A line of the table over prompts."""
        return [
            name,
            *(mean(self.of(prompts, kind, "psnr")) for kind in KINDS),
            mean(self.differences(prompts, "default"), "{:.3f}"),
            *(count(self.of(prompts, kind, "right")) for kind in KINDS),
            count(self.of(prompts, "tolerance 0", "bitwise")),
            *(mean(self.of(prompts, k, "steps_per_sweep")) for k in ("tolerance 0", "default")),
            mean(self.deviations(prompts, "default"), "{:.1f}"),
        ]

    def table(self) -> str:
        """The table over prompts and seeds."""
        psnrs = [f"PSNR, {kind}" for kind in KINDS]
        heads = ["prompt", *psnrs, "default apart, dB", *(f"CLIP, {kind}" for kind in KINDS)]
        heads += ["bitwise", "steps a sweep, tolerance 0", "default", "deviation, %"]
        rows = [self.row(p + (" (held out)" if p in HELD_OUT else ""), (p,)) for p in PROMPTS]
        return markdown(heads, [*rows, self.row("all", PROMPTS)])

    def targets(self) -> str:
        """Returns the table of targets and what was reached."""
        everyone = [subject.caption for subject in all_subjects()]
        trained = [prompt for prompt in everyone if prompt not in HELD_OUT]
        own = self.once(trained, "psnr")
        others = self.once(HELD_OUT, "psnr")
        views = self.once(everyone, "right_views")
        apart = self.differences(PROMPTS, "default")
        least = f"; least {min(own):.2f}" if own else ""
        rows = [
            [f"mean PSNR, {len(own)} trained pairs", "20 dB", mean(own) + " dB" + least],
            [f"mean PSNR, {len(others)} held-out pairs", "within 2 dB", mean(others) + " dB"],
            ["CLIP chooses the prompt's caption", "90 %", count(self.once(everyone, "right"))],
            ["the same of single views", "", mean((100 * v for v in views), "{:.1f} %")],
            ["bitwise at tolerance 0", "all", count(self.of(PROMPTS, "tolerance 0", "bitwise"))],
            [
                f"mean absolute PSNR difference, {len(apart)} pairs",
                "0.2 dB",
                mean(apart, "{:.3f} dB"),
            ],
            ["largest of them", "", f"{max(apart):.3f} dB" if apart else ""],
        ]
        return "## Targets\n\n" + markdown(["figure", "target", "found"], rows)

    def grid(self) -> str:
        """PSNR of every prompt of the built-in world."""
        rows = [[shape, *(self.cell(f"a {c} {shape}") for c in COLOURS)] for shape in SHAPES]
        return "## All prompts, seed 0, at the defaults\n\n" + markdown(["PSNR", *COLOURS], rows)

    def cell(self, prompt: str) -> str:
        """PSNR, with marks."""
        found = self.runs.get(Run(prompt, 0, "default").name)
        if found is None:
            return ""
        chosen = "" if found["right"] else f" (seen as {found['chosen'][2:]})"
        return f"{found['psnr']:.1f}" + ("*" if prompt in HELD_OUT else "") + chosen


NOTES = """
The text-to-3D recipe as it ships (batch 4, learning rate 0.04, the shipped pixel model), but {steps} steps; {seeds}
seeds of each prompt, paired: the three runs of a seed see the same random numbers. *Tolerance 0* has a window of 2,
*default* is the default tolerance with a window of 8, which eight devices would have. *PSNR* is that of 32 held-out
views against the true ones, dB; *default apart* is the mean absolute difference from the sequential run of the same
seed. *CLIP* is R-precision: the share of the objects of which the shipped CLIP, from the mean over 8 azimuths, prefers
the prompt's caption to those of the 63 other pairs of shape and colour. *Bitwise* counts runs whose parameters,
optimizer state and losses have the sequential run's bits. *Steps a sweep* is the ceiling of the speed-up. *Deviation*
is the distance of the final parameters from those of the sequential run, in % of the median distance of two seeds.
*Held out* (* in the last table): pairs of shape and colour that the guidance model did not see in its training.
"""


def body(content: dict[str, Any]) -> tuple[str, str]:
    """Notes and tables of the document."""
    setup, runs = content["setup"], content["runs"]
    results = Results(runs, content.get("spreads", {}), setup["seeds"])
    cpu = sum(run["optimization_cpu_seconds"] for run in runs.values()) / 60
    ending = f"{len(runs)} runs, {cpu:.0f} CPU minutes of optimization."
    text = "\n\n".join([results.table(), results.targets(), results.grid(), ending])
    return NOTES.format(**setup), text


def said(found: dict[str, Any]) -> str:
    """Returns one run's figures in short."""
    return f"{found['psnr']:.2f} dB, {found['optimization_cpu_seconds']:.0f} CPU s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prompts.json"))
    parser.add_argument("--scenes", type=Path, default=Path("build/prompts"))
    options = parser.parse_args()
    setup = {key: getattr(options, key) for key in ("steps", "seeds")}
    command = "python benchmarks/prompts.py" + "".join(
        f" --{name} {getattr(options, name)}" for name in ("steps", "seeds", "processes")
    )
    kept = ResultStore(options.out, command, setup, "Text-to-3D over prompts and seeds", body)
    options.scenes.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(range(options.seeds), PROMPTS))  # whole seeds first
    others = [s.caption for s in all_subjects() if s.caption not in PROMPTS]
    references = [Run(prompt, seed, "sequential") for seed, prompt in pairs]
    trials = [Run(prompt, seed, "default") for seed, prompt in pairs]
    trials += [Run(prompt, 0, "default") for prompt in others]
    trials += [Run(prompt, seed, "tolerance 0") for seed, prompt in pairs]
    for wanted in (references, trials):  # the second are compared with the first
        tasks = [(run.name, (run, options.steps, options.scenes)) for run in wanted]
        kept.carry_out(carry_out, tasks, options.processes, said)
        spreads = {prompt: spread(options.scenes, prompt, options.seeds) for prompt in PROMPTS}
        kept.content["spreads"] = {p: found for p, found in spreads.items() if found is not None}
    kept.write()
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
