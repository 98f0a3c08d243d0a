"""What a page holds of an object: its arrays in few bits, compressed, as text."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from picardopt_3d.export.shown import ShownMesh, ShownSplats
from picardopt_3d.pages.pictures import picture_of
from picardopt_3d.scenes.gaussians.projection import BLUR

_STEPS = 65535  # of a coordinate, across the object


def packed(shown: ShownMesh | ShownSplats, pixels: int) -> dict[str, Any]:
    """Returns an object as `object.js` reads it.

    Positions have 16 bits a coordinate, normals, colours, rotations, and logarithms of scales 8 bits a number.

    Args:
        shown: The object.
        pixels: Along an edge of the views that the object is to look like: Gaussians are blurred as there.
    """
    if isinstance(shown, ShownMesh):
        return _mesh(shown)
    return _splats(shown) | {"pixels": pixels, "blur": BLUR}


def _mesh(mesh: ShownMesh) -> dict[str, Any]:
    """Returns triangles."""
    places, box = _placed(mesh.vertices)
    arrays: dict[str, npt.NDArray[Any]] = {
        "positions": places,
        "normals": _four(np.rint(127 * mesh.normals), np.int8),
        "faces": mesh.faces.astype(np.uint32),
    }
    extra: dict[str, Any] = {}
    if mesh.texture is not None and mesh.coordinates is not None:
        arrays["coordinates"] = np.rint(mesh.coordinates.clip(0, 1) * _STEPS).astype(np.uint16)
        extra["texture"] = picture_of(mesh.texture)
    elif mesh.colours is not None:
        arrays["colours"] = _four(mesh.colours, np.uint8)
    return {"kind": "mesh", **box, **_joined(arrays), **extra}


def _splats(splats: ShownSplats) -> dict[str, Any]:
    """Returns Gaussians; those too small to be seen are as large as the smallest that can."""
    places, box = _placed(splats.means)
    extent = max(box["size"])
    logs = np.log(splats.scales.clip(1e-4 * extent, 10 * extent))
    low, high = float(logs.min()), float(logs.max())
    share = (logs - low) / max(high - low, 1e-9)
    rgba = np.column_stack([splats.colours, np.rint(255 * splats.opacities)])
    arrays: dict[str, npt.NDArray[Any]] = {
        "positions": places,
        "scales": _four(np.rint(255 * share), np.uint8),
        "rotations": np.rint(127 * splats.rotations).astype(np.int8),
        "colours": rgba.astype(np.uint8),
    }
    return {"kind": "splats", **box, "scales": [low, high], **_joined(arrays)}


def _placed(points: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint16], dict[str, Any]]:
    """Returns points as shares of the box around them, `[count, 4]` (the last is 0), and the box."""
    low = points.min(axis=0).astype(np.float64)
    size = np.maximum(points.max(axis=0) - low, 1e-6)
    return _four(np.rint((points - low) / size * _STEPS), np.uint16), {
        "low": low.tolist(),
        "size": size.tolist(),
    }


def _four(rows: npt.NDArray[Any], kind: type[np.generic]) -> npt.NDArray[Any]:
    """Returns rows of three as rows of four, which graphics cards want: the last number is 0."""
    wide = np.zeros((len(rows), 4), kind)
    wide[:, :3] = rows
    return wide


def _joined(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Returns arrays as one compressed text, and where each begins, in bytes."""
    entries, parts, offset = [], [], 0
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        content = (
            little.tobytes()
        )  # a multiple of four bytes: rows have 4 or 2 times 2 numbers, or 4 bytes each
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        entries.append({"name": name, "kind": kind, "offset": offset, "length": array.size})
        parts.append(content)
        offset += len(content)
    return {
        "arrays": entries,
        "packed": base64.b64encode(zlib.compress(b"".join(parts), 9)).decode(),
    }
