"""What a view of triangles costs, forward and backward, and how much memory it takes.

    python benchmarks/mesh_rasterizer.py --out benchmarks/results/mesh_rasterizer.md

The mesh is a sphere of radius 0.5, an icosahedron whose faces are split into four again and again, that is seen from a
distance of 1.65. A view is all of it: nearest faces, six interpolated channels, antialiased silhouettes. Each row runs
in a process of its own, so that its memory is its own; on one thread, or on a GPU with --device cuda.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.mesh.config import Rasterizer
from picardopt_3d.scenes.mesh.rasterize import antialias, interpolate, rasterize
from picardopt_3d.scenes.mesh.triangles import Triangles
from rasterizer import fastest, peak
from tables import document, machine, markdown, number, publish
from torch import Tensor

SUBDIVISIONS, SIZES = (3, 4, 6), (64, 128, 512)
NOTES = """
Milliseconds of CPU time a view (of wall time on a GPU), the fastest of the repeats: *forward* without gradients,
*both* with the gradients of the vertices and of what is interpolated, *four views* both for four views at once, divided
by four. *MB* is by how much one view, both ways, raised the peak memory of the process (on a GPU: of the allocator)
over that of the same call with 20 faces at 16 pixels.
"""


def sphere(subdivisions: int, device: str) -> tuple[Triangles, Tensor]:
    """A sphere and six channels of values at its vertices; leaves that need their gradients."""
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.5)
    vertices = torch.tensor(mesh.vertices, dtype=torch.float32)
    faces = torch.tensor(mesh.faces, dtype=torch.int64)
    values = torch.rand(len(vertices), 6, generator=torch.Generator().manual_seed(0))
    leaves = (x.to(device).requires_grad_() for x in (vertices, values))
    return Triangles(next(leaves), faces.to(device)), next(leaves)


def picture(
    triangles: Triangles, values: Tensor, size: int, views: int, rasterizer: Rasterizer
) -> Tensor:
    """Antialiased views of the values."""
    cameras = orbit_cameras(15.0, torch.arange(views) * 90.0 + 20).to(values.device)
    drawn = rasterize(triangles, cameras, size, size, rasterizer=rasterizer)
    image = interpolate(drawn, triangles.faces, values)
    return antialias(image, drawn, triangles, cameras)


def both(
    triangles: Triangles, values: Tensor, size: int, views: int, rasterizer: Rasterizer
) -> None:
    """Draws views, and sets the gradients of a sum."""
    picture(triangles, values, size, views, rasterizer).square().sum().backward()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The figures of one row, in this process."""
    torch.set_num_threads(1)
    size, device, used = options.size, options.device, options.rasterizer
    both(*sphere(0, device), 16, 1, used)  # what torch loads once
    mesh = sphere(options.count, device)
    before = peak(device)
    both(*mesh, size, 1, used)
    grown = peak(device) - before
    forward = torch.no_grad()(picture)
    for _ in range(2):
        both(*mesh, size, 4, used)
    return {
        "forward": fastest(options.repeats, device, forward, *mesh, size, 1, used),
        "both": fastest(options.repeats, device, both, *mesh, size, 1, used),
        "four views": fastest(options.repeats, device, both, *mesh, size, 4, used) / 4,
        "MB": grown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subdivisions", type=int, nargs="+", default=SUBDIVISIONS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rasterizer", default="torch", choices=["torch", "nvdiffrast"])
    parser.add_argument("--out", type=Path, help="the Markdown file")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count is not None:
        print(json.dumps(measure(options)))
        return
    where, rows = machine(), []
    for count, size in itertools.product(options.subdivisions, options.sizes):
        command = [sys.executable, __file__, f"--count={count}", f"--size={size}"]
        for name in ("repeats", "device", "rasterizer"):
            command.append(f"--{name}={getattr(options, name)}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        rows.append([f"{20 * 4**count:,}", size, *(number(value) for value in found.values())])
    table = markdown(["faces", "pixels", "forward", "both", "four views", "MB"], rows)
    command = " ".join(["python", *sys.argv])
    text = document(
        "Cost of a view of triangles",
        command,
        where,
        f"{NOTES.strip()}\n\nRasterizer: {options.rasterizer}.",
        table,
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
