"""What a sweep costs besides one gradient of real size, and what one device gains by joined calls.

    python benchmarks/gpu_drift.py --out benchmarks/results/gpu_drift.md

Score distillation through a UNet with Stable Diffusion 2.1's architecture and random weights (its cost does not depend
on them), a scene of 12.6 million parameters as in the hash grid of the published NeRF pipelines, and Adam. One process,
so the window's slots run one after the other, or share a call of the UNet. The exchange between devices is not in it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tables import document, machine, markdown, number, publish
from unet_task import PARAMETERS, Distillation, Unet, milliseconds

import picardopt
from picardopt import ParallelPicardOptimizer, StepRelativeTolerance


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        batches: Views a step.
        compiled: Views of the rows with a compiled UNet.
        window: Steps a sweep.
        sweeps: Sweeps of each timing, after one that is not timed.
        parameters: Of the scene.
        device: Where.
        small: A tiny UNet, to check this script itself.
        out: Markdown file.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    compiled: tuple[int, ...] = (1,)
    window: int = 8
    sweeps: int = 3
    parameters: int = PARAMETERS
    device: str = "cuda"
    small: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Sweep:
    """Milliseconds of a sweep and of its parts; and of a step, as `picardopt.plan` predicts it.

    Attributes:
        predicted: Of a step by one device that evaluates so many slots in a sweep.
    """

    whole: float
    drifts: float
    rollout: float
    commits: float
    predicted: float


def adam(parameters: list[torch.nn.Parameter], device: torch.device) -> torch.optim.Adam:
    fused = {"fused": True} if device.type == "cuda" else {}
    return torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-15, **fused)


def sweep(options: Options, unet: Unet, batch: int, *, joined: bool) -> Sweep:
    """Times sweeps that keep all their steps, with the default's measurements."""
    gradient = picardopt.batched(unet.gradient) if joined else unet.gradient
    task = Distillation(unet, batch, options.parameters, gradient)
    optimizer = ParallelPicardOptimizer(
        adam(task.parameters, unet.device),
        window=options.window,
        tolerance=StepRelativeTolerance(1e30),
        audit="never",
    )
    for _ in range(2 * options.window):  # joined calls begin in the second sweep
        optimizer.step(task)
    before, count = dict(optimizer.stats.seconds), options.sweeps
    step = milliseconds(lambda: optimizer.step(task), options.window * count, unet.device)
    spent = {k: 1e3 * (v - before[k]) / count for k, v in optimizer.stats.seconds.items()}
    predicted = [
        1e3 * option.seconds
        for option in picardopt.plan(optimizer, task, devices=1).options
        if option.joined is joined and option.window == (options.window if joined else 1)
    ]
    parts = spent["drift"], spent["rollout"], spent["commit"]
    return Sweep(step * options.window, *parts, predicted[0] if predicted else float("nan"))


def measure(options: Options, unet: Unet, batch: int) -> list[str]:
    """Measures one row."""
    task = Distillation(unet, batch, options.parameters)
    base = adam(task.parameters, unet.device)

    def plain_step() -> None:
        task()
        base.step()

    milliseconds(plain_step, 3, unet.device)
    plain = milliseconds(plain_step, 2 * options.window, unet.device)
    one_by_one = sweep(options, unet, batch, joined=False)
    joined = sweep(options, unet, batch, joined=True)
    drift = one_by_one.drifts / options.window
    ceiling = options.window * plain / (one_by_one.whole - one_by_one.drifts + drift)
    gain = options.window * plain / joined.whole
    times = plain, drift, one_by_one.rollout, one_by_one.commits, one_by_one.whole, joined.whole
    predicted = [f"{each.predicted:.1f}" for each in (one_by_one, joined)]
    return [str(batch), *map(number, times), f"{ceiling:.1f}", f"{gain:.2f}", *predicted]


def main(options: Options) -> None:
    """Prints the table, and writes it."""
    where, device, rows = machine(), torch.device(options.device), []
    for compiled, batches in ((False, options.batches), (True, options.compiled)):
        if batches:
            unet = Unet("sd21", device, small=options.small, compiled=compiled)
            kind = "compiled" if compiled else "eager"
            for batch in batches:
                rows.append([kind, *measure(options, unet, batch)])
                print(*rows[-1], file=sys.stderr, flush=True)
    parts = ("plain step", "drift", "rollout", "commits", "sweep", "joined sweep")
    plans = "plain, planned", "joined, planned"
    table = markdown(("UNet", "views", *parts, "ceiling", "one device", *plans), rows)
    command = " ".join(["python benchmarks/gpu_drift.py", *sys.argv[1:]])
    notes = NOTES.format(window=options.window)
    publish(
        document("A sweep beside drifts of real size", command, where, notes, table), options.out
    )


NOTES = """
Milliseconds. Score distillation through a UNet of SD 2.1's architecture (865 M parameters, random, half precision) with
classifier-free guidance at 64 x 64 latents; a scene of 12.6 M parameters in a table; fused Adam; a window of {window}
in one process on one device. *Plain step*: drift and `base.step()` in an ordinary loop. *Drift*: one slot's evaluation
in a sweep; *rollout* and *commits*: all that a sweep does besides its drifts. *Joined sweep*: the same with the UNet
called once for all slots (`picardopt.batched`). *Ceiling*: the speed-up on as many devices as slots if every guess were
accepted and the exchange of gradients cost nothing. *One device*: plain steps in the time of a joined sweep, if every
guess were accepted. *Planned*: a plain step, and a step of a joined sweep, as `picardopt.plan` predicts them from the
run. The exchange was not measured: one device.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
