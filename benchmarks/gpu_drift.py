"""What a sweep costs besides one gradient of real size: score distillation through a Stable-Diffusion-2.1-sized UNet.

    python benchmarks/gpu_drift.py --out benchmarks/results/gpu_drift.md

The UNet has SD 2.1's architecture with random weights in half precision (its cost does not depend on them), the scene
12.6 million parameters as the hash grid of the published NeRF pipelines, the base is Adam. One process, so the window's
slots run one after the other: the table holds what would be parallel (one drift) and what would not (rollout, commits).
The exchange between devices is not in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import UNet2DConditionModel
from tables import document, machine, markdown, number
from torch import Tensor

from picardopt import ParallelPicardOptimizer, StepRelativeTolerance


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        batches: Views a step.
        window: Steps a sweep.
        sweeps: Sweeps a row, after one that is not timed.
        parameters: Of the scene.
        device: Where.
        small: A tiny UNet, to check this script itself.
        out: Markdown file.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    window: int = 8
    sweeps: int = 3
    parameters: int = 12_599_920
    device: str = "cuda"
    small: bool = False
    out: Path | None = None


def build_unet(options: Options) -> UNet2DConditionModel:
    """SD 2.1's UNet (its published configuration), random weights."""
    sizes = {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    if options.small:
        sizes = {
            "block_out_channels": (32, 32, 32, 32),
            "attention_head_dim": 8,
            "cross_attention_dim": 1024,
        }
    kind = torch.float32 if options.device == "cpu" else torch.float16
    with torch.device(options.device):
        unet = UNet2DConditionModel(sample_size=64, **sizes)
    return unet.to(kind).requires_grad_(False).eval()


class Task:
    """A table of features that is looked up, decoded and scored: a hash grid's memory traffic without its library."""

    def __init__(self, options: Options, unet: UNet2DConditionModel, batch: int) -> None:
        self.unet, self.batch, self.device = unet, batch, torch.device(options.device)
        self.table = torch.nn.Parameter(
            1e-2 * torch.randn(options.parameters // 2, 2, device=self.device)
        )
        self.decoder = torch.nn.Linear(16, 4).to(self.device)
        self.text = torch.randn(1, 77, 1024, device=self.device, dtype=unet.dtype)
        self.parameters = [self.table, *self.decoder.parameters()]

    def closure(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        pixels = self.batch * 64 * 64
        rows = torch.randint(len(self.table), (pixels, 8), device=self.device)
        views = self.decoder(self.table[rows].flatten(1)).view(self.batch, 64, 64, 4)
        latents = views.permute(0, 3, 1, 2)
        noise = torch.randn_like(latents)
        times = torch.randint(20, 980, (self.batch,), device=self.device)
        with torch.no_grad():
            both = (latents + noise).to(self.unet.dtype).repeat(2, 1, 1, 1)
            text = self.text.expand(2 * self.batch, -1, -1)
            plain, prompted = self.unet(both, times.repeat(2), text).sample.float().chunk(2)
            gradient = plain + 7.5 * (prompted - plain) - noise
        loss = (latents * gradient).sum() / self.batch
        loss.backward()
        return loss


def measure(options: Options, unet: UNet2DConditionModel, batch: int) -> list[str]:
    """Measures one row: milliseconds of a drift, of a sweep's sequential part, and their ratio."""
    task = Task(options, unet, batch)
    fused = {"fused": True} if options.device != "cpu" else {}
    base = torch.optim.Adam(task.parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-15, **fused)
    optimizer = ParallelPicardOptimizer(
        base,
        window=options.window,
        tolerance=StepRelativeTolerance(
            1e30
        ),  # the default's measurements, and everything accepted
        audit="never",
        total_steps=options.window * (options.sweeps + 1),
    )
    for _ in range(options.window):
        optimizer.step(task.closure)
    plain = timed(options, lambda: (task.closure(), base.step()), 2 * options.window)
    before = dict(optimizer.stats.seconds)
    count = options.window * options.sweeps
    sweep = timed(options, lambda: optimizer.step(task.closure), count) * options.window
    spent = {k: 1e3 * (v - before[k]) / options.sweeps for k, v in optimizer.stats.seconds.items()}
    drift = spent["drift"] / options.window
    ceiling = options.window * plain / (sweep - spent["drift"] + drift)
    times = map(number, (plain, drift, spent["rollout"], spent["commit"], sweep))
    return [str(batch), *times, f"{ceiling:.1f}"]


def timed(options: Options, function: Callable[[], object], calls: int) -> float:
    """Returns the milliseconds of a call."""
    wait = torch.cuda.synchronize if options.device != "cpu" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return 1e3 * (time.perf_counter() - start) / calls


def main(options: Options) -> None:
    """Prints the table, and writes it."""
    unet = build_unet(options)
    rows = [measure(options, unet, batch) for batch in options.batches]
    headers = ("views", "plain step", "drift", "rollout", "commits", "sweep", "ceiling")
    table = markdown(headers, rows)
    print(table)
    if options.out is not None:
        command = "python benchmarks/gpu_drift.py " + " ".join(sys.argv[1:])
        text = document("A sweep beside drifts of real size", command, machine(), NOTES, table)
        options.out.write_text(text)


NOTES = """
Milliseconds. Score distillation through a UNet of SD 2.1's architecture (865 M parameters, random, half precision) with
classifier-free guidance at 64 x 64 latents; a scene of 12.6 M parameters in a table; fused Adam; a window of 8 in one
process on one device, so its drifts run one after the other. *Plain step*: drift and `base.step()` in an ordinary
loop. *Drift*: one slot's evaluation in a sweep; *rollout* and *commits*: all that a sweep does besides its drifts.
*Ceiling*: the speed-up on eight devices if every guess were accepted and the exchange of gradients cost nothing,
eight plain steps over one drift and the rest of the sweep. The exchange was not measured: one device.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
