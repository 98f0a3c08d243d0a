"""Texture coordinates of a mesh, by xatlas.

xatlas holds the interpreter for seconds (3 s for 50,000 triangles), in which no Ctrl-C could end it and no bar move:
it runs in a process of its own.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from picardopt_3d.scenes.mesh import unwrap_process
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap_process import pack, unpack

MOST_FACES = 200_000
"""Triangles beyond which unwrapping would take many minutes."""

PADDING = 3
"""Texels between charts: the library's atlas is up to a third larger than asked for, and two have to be left."""

_EXTENT = 7
"""The library is given a mesh of less extent than 2^7, by a power of two: it has lengths and areas below which it takes
edges and triangles for nothing (1.2e-7)."""

_PATIENCE = 0.1  # seconds between signs of life


class Unwrapped(NamedTuple):
    """Where the triangles of a mesh lie on its texture.

    Attributes:
        coordinates: In [0, 1] from the left and from the top of the texture, float32, `[count, 2]`.
        faces: Indices of three coordinates for each triangle, in the order of the mesh's, int64, `[faces, 3]`.
    """

    coordinates: Tensor
    faces: Tensor


def unwrap(
    triangles: Triangles, size: int, *, progress: Callable[[int], object] | None = None
) -> Unwrapped:
    """Lays the triangles of a mesh flat on a texture, with room between charts for bilinear sampling.

    The result is a function of the arguments alone. It is on the CPU.

    Args:
        triangles: The mesh.
        size: Pixels along each edge of the texture.
        progress: Called with 0 ten times a second while the library works, then with the number of triangles.

    Raises:
        ValueError: There are no triangles, too many, or some that the library finds no place for.
        KeyboardInterrupt: Ctrl-C.
    """
    count = len(triangles.faces)
    if count == 0:
        raise ValueError("a mesh without triangles cannot be unwrapped")
    if count > MOST_FACES:
        raise ValueError(
            f"{count} triangles are too many to unwrap: simplify to at most {MOST_FACES} (--faces)"
        )
    vertices = triangles.vertices.detach().cpu().float()
    extent = float((vertices.amax(0) - vertices.amin(0)).max())
    if not 0 < extent < math.inf:
        what = "all its vertices are at one point" if extent == 0 else "a vertex is not finite"
        raise ValueError(f"the mesh cannot be unwrapped: {what}")
    given = {
        "vertices": (vertices * 2.0 ** (_EXTENT - math.frexp(extent)[1])).contiguous().numpy(),
        "faces": triangles.faces.cpu().numpy().astype(np.uint32),
        "size": np.array(size),
        "padding": np.array(PADDING),
    }
    found = unpack(_run(pack(given), progress))
    if progress is not None:
        progress(count)
    coordinates = torch.from_numpy(found["coordinates"].astype(np.float32))
    if not bool(coordinates.isfinite().all()):
        raise ValueError(
            "the mesh cannot be unwrapped: xatlas finds no place for some triangles, as if they had no area; "
            "simplify the mesh to fewer triangles"
        )
    return Unwrapped(coordinates, torch.from_numpy(found["faces"].astype(np.int64)))


def _run(content: bytes, progress: Callable[[int], object] | None) -> bytes:
    """Runs the program on its input, and returns its output.

    Not by multiprocessing: that would import torch again, and refuse to work in daemonic processes.
    """
    command = [sys.executable, "-P", str(unwrap_process.__file__), str(os.getpid())]
    with (
        tempfile.TemporaryFile() as given
    ):  # not a pipe, which `communicate` forgets to fill after a timeout
        given.write(content)
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, said = _ended(process, progress)
    if process.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if process.returncode != 0:
        reason = f"({process.returncode}): {said.decode(errors='replace').strip()}"
        raise ValueError(f"the mesh cannot be unwrapped: xatlas failed {reason}")
    return output


def _ended(
    process: subprocess.Popen[bytes], progress: Callable[[int], object] | None
) -> tuple[bytes, bytes]:
    """Waits for a process, and returns what it wrote; whatever happens, it has ended then."""
    try:
        while True:
            try:
                return process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                if progress is not None:
                    progress(0)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
