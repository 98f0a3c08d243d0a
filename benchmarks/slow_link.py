"""What a step takes on two hosts over a slow link: running ahead, and plain data parallelism.

The hosts are namespaces of this machine (`tests.helpers.hosts`: root, or user namespaces), with one process each, and
what joins them holds every packet back for a while. The network is small, so that nearly all the time is the link's.

    python benchmarks/slow_link.py --out benchmarks/results/slow_link.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tables import document, machine, markdown, number, publish
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, step_rng

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 16
"""Steps that are not timed."""
HEADERS = ["each way, ms", "parameters", "way", "ms a step", "steps a sweep", "ms a sweep", "loss"]
NOTES = """
Two hosts of one process each (namespaces of one machine), gloo, one thread a process. The link holds each packet back
for so many milliseconds, in either direction; it loses none and has no other limit. *Data parallel*: half of the batch
on each process, one all_reduce of all gradients, one step of Adam: its best case. *Ahead*: the whole batch on one
process, the default tolerance. *Loss*: mean of the timed steps.
"""


def network(parameters: int) -> nn.Sequential:
    torch.manual_seed(0)
    width = max(1, parameters // 6)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(model: nn.Module, part: slice) -> Tensor:
    x = torch.randn(16, 4)[part]
    loss: Tensor = (model(x) - x.sin().sum(dim=1, keepdim=True)).square().mean()
    return loss


def data_parallel(model: nn.Module) -> Callable[[], Tensor]:
    """Returns a function that takes a step."""
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    mine, steps = slice(dist.get_rank(), None, 2), iter(range(10**9))

    def step() -> Tensor:
        base.zero_grad()
        with step_rng(0, next(steps)):
            loss = loss_of(model, mine)
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([loss.detach().view(1), *(g.view(-1) for g in gradients)])
        dist.all_reduce(flat)
        mean, *means = (flat / 2).split([1, *(g.numel() for g in gradients)])
        for gradient, new in zip(gradients, means, strict=True):
            gradient.copy_(new.view_as(gradient))
        base.step()
        return mean

    return step


def ahead(model: nn.Module, **options: Any) -> tuple[Callable[[], Tensor], ParallelPicardOptimizer]:
    """Returns a function that takes a step, and the optimizer."""
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = ParallelPicardOptimizer(base, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, slice(None))
        loss.backward()
        return loss

    return lambda: optimizer.step(closure), optimizer


def timed(step: Callable[[], Tensor], steps: int) -> tuple[float, float]:
    """Returns the milliseconds of a step and the mean loss."""
    began, total = time.perf_counter(), 0.0
    for _ in range(steps):
        total += float(step())
    return 1e3 * (time.perf_counter() - began) / steps, total / steps


def work(parameters: Sequence[int], windows: Sequence[int], steps: int) -> list[list[str]]:
    """Times every way; runs on both hosts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for count in parameters:
        name = f"{count:,}"
        step = data_parallel(network(count))
        timed(step, WARM_UP)
        cost, loss = timed(step, steps)
        rows.append([name, "data parallel", number(cost), "", "", number(loss)])
        for window in windows:
            for audit in ("auto", "never"):
                step, optimizer = ahead(network(count), window=window, audit=audit)
                timed(step, WARM_UP)
                sweeps = optimizer.stats.sweeps
                cost, loss = timed(step, steps)
                stride = steps / (optimizer.stats.sweeps - sweeps)
                way = f'ahead, window {window}, `audit="{audit}"`'
                rows.append(
                    [name, way, number(cost), number(stride), number(cost * stride), number(loss)]
                )
    dist.destroy_process_group()
    return rows


def measure(delay: float, arguments: list[str]) -> list[list[str]]:
    """Runs `work` on two hosts, joined by a link with a delay in milliseconds."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.hosts import ADDRESSES, two_hosts

    with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder)) as (hosts, wire):
        wire(f"delay {delay / 1e3}")
        processes = []
        for rank, host in enumerate(hosts):
            told = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
            told |= {"RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, __file__, "--worker", *arguments]
            processes.append(host.start(command, env=os.environ | told, stdout=subprocess.PIPE))
        texts = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("a process failed")
    return [[f"{delay:g}", *row] for row in json.loads(texts[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 50], help="ms each way")
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_000])
    parser.add_argument("--windows", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        json.dump(work(options.parameters, options.windows, options.steps), sys.stdout)
        return
    where, given = machine(), sys.argv[1:]
    rows = [row for delay in options.delays for row in measure(delay, given)]
    command = " ".join(["python benchmarks/slow_link.py", *given])
    publish(document("A slow link", command, where, NOTES, markdown(HEADERS, rows)), options.out)


if __name__ == "__main__":
    main()
