"""The program that unwraps one mesh: arrays come through its standard input, arrays leave through its output.

`unwrap` starts it by its path, so that it imports nothing but numpy and xatlas.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_PR_SET_PDEATHSIG = 1


def pack(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """Returns arrays as bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """Returns the arrays that `pack` made bytes of."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def main(parent: int) -> None:
    """Reads a mesh, unwraps it and writes the texture coordinates.

    Args:
        parent: The process that waits for the result; this one ends with it.
    """
    # The library holds the interpreter for as long as it runs: only signals without a Python handler end it at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    given = unpack(sys.stdin.buffer.read())
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(given["vertices"], given["faces"])
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding = int(given["size"]), int(given["padding"])
    atlas.generate(xatlas.ChartOptions(), packing)
    corners, faces, coordinates = atlas[0]
    found = {"corners": corners, "faces": faces, "coordinates": coordinates}
    sys.stdout.buffer.write(pack(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
