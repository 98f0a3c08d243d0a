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
from dataclasses import replace
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
from picardopt_3d.world import all_subjects, parse_prompt
from picardopt_3d.world.yardstick import psnr_against_truth
from plain_loop import sequential_step
from prompt_tables import (
    KINDS,
    PROMPTS,
    Run,
    body,
    reference_of,
)
from result_store import ResultStore
from safetensors.torch import load_file, save_file
from small_scenes import distances, guidance_of

from picardopt import ParallelPicardOptimizer

VIEWS, VIEW_SIZE = 8, 64
"""Azimuths that CLIP sees, and their pixels."""


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
