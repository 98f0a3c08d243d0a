"""What a view of 3D Gaussians costs, forward and backward, and how much memory it takes.

    python benchmarks/rasterizer.py --out benchmarks/results/rasterizer.md

The Gaussians fill a ball of radius 0.5 that is seen from a distance of 1.65. Each row runs in a process of its own, so
that its memory is its own; on one thread, or on a GPU with --device cuda.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.gaussians.rasterize import chosen, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats
from tables import document, machine, markdown, number, publish

COUNTS, SIZES = (500, 2000, 8000), (32, 64, 128)
NOTES = """
Milliseconds of CPU time a view (of wall time on a GPU), the fastest of the repeats: *forward* without gradients,
*both* with the gradients of all parameters, *four views* both for four views at once, divided by four. *MB* is by
how much one view, both ways, raised the peak memory of the process (on a GPU: of the allocator) over that of the
same call with one Gaussian at 16 pixels.
"""


def cloud(count: int, scale: float, opacity: float, device: str) -> Splats:
    """Gaussians in a ball, with standard deviations about `scale`; leaves that need their gradients."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    radii = 0.5 * torch.rand(count, 1, generator=generator) ** (1 / 3)
    tensors = (
        radii * directions,
        math.log(scale) + 0.3 * torch.randn(count, 3, generator=generator),
        torch.randn(count, 4, generator=generator),
        torch.full((count,), math.log(opacity / (1 - opacity))),
        torch.randn(count, 3, generator=generator),
        torch.zeros(count, 0, 3),
    )
    return Splats(*(tensor.to(device).requires_grad_() for tensor in tensors))


def both(splats: Splats, size: int, views: int) -> None:
    """Renders views, and sets the gradients of a sum."""
    device = splats.means.device
    cameras = orbit_cameras(15.0, torch.arange(views) * 90.0).to(device)
    pictures = rasterize(splats, cameras, size, size, degree=0)
    (pictures.colour.sum() + pictures.opacity.sum() + pictures.depth.sum()).backward()


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def fastest(repeats: int, device: str, call: object, *arguments: object) -> float:
    """Milliseconds of the fastest call."""
    spent = []
    for _ in range(repeats):
        begun = clock(device)
        call(*arguments)  # type: ignore[operator]
        spent.append(clock(device) - begun)
    return 1e3 * min(spent)


def peak(device: str) -> float:
    """Peak memory so far, MB."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The figures of one row, in this process."""
    torch.set_num_threads(1)
    size, device = options.size, options.device
    both(cloud(1, options.scale, options.opacity, device), 16, 1)  # what torch loads once
    before = peak(device)
    splats = cloud(options.count, options.scale, options.opacity, device)
    both(splats, size, 1)
    grown = peak(device) - before

    @torch.no_grad()
    def forward() -> None:
        rasterize(splats, orbit_cameras(15.0, 0.0).to(device), size, size, degree=0)

    for _ in range(2):
        both(splats, size, 4)
    return {
        "forward": fastest(options.repeats, device, forward),
        "both": fastest(options.repeats, device, both, splats, size, 1),
        "four views": fastest(options.repeats, device, both, splats, size, 4) / 4,
        "MB": grown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--scale", type=float, default=0.025, help="standard deviation, world units"
    )
    parser.add_argument("--opacity", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the Markdown file")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(measure(options)))
        return
    where, rows = machine(), []
    for count, size in itertools.product(options.counts, options.sizes):
        command = [sys.executable, __file__, f"--count={count}", f"--size={size}"]
        for name in ("scale", "opacity", "repeats", "device"):
            command.append(f"--{name}={getattr(options, name)}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        rows.append([f"{count:,}", size, *(number(value) for value in found.values())])
    table = markdown(["Gaussians", "pixels", "forward", "both", "four views", "MB"], rows)
    command = " ".join(["python", *sys.argv])
    used = chosen("auto", torch.device(options.device))
    notes = f"{NOTES.strip()}\n\nRasterizer: {used}; standard deviations about {options.scale} world units, "
    notes += f"opacity {options.opacity}."
    text = document("Cost of a view of 3D Gaussians", command, where, notes, table)
    publish(text, options.out)


if __name__ == "__main__":
    main()
