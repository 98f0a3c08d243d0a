"""The container of a binary glTF 2.0 file (GLB), and what its numbers mean."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FLOAT, UNSIGNED = 5126, 5125
"""Codes of component types."""
VERTICES, INDICES = 34962, 34963
"""Codes of the purposes of buffer views."""

_TYPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}


@dataclass(frozen=True, eq=False)
class Part:
    """An array of a file, its accessor and buffer view.

    Attributes:
        array: One row a vertex, or an index each; its elements have four bytes. [count] or [count, components]
        purpose: What the buffer view is for.
        bounds: Whether its least and largest values are written, as glTF requires of positions.
    """

    array: npt.NDArray[Any]
    purpose: int = VERTICES
    bounds: bool = False

    def accessor(self, index: int) -> dict[str, Any]:
        """Returns the accessor's entry, for the buffer view of this index."""
        array = self.array
        entry: dict[str, Any] = {
            "bufferView": index,
            "componentType": UNSIGNED if array.dtype.kind == "u" else FLOAT,
            "type": _TYPES[array[:1].size],
            "count": len(array),
        }
        if self.bounds:
            entry |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
        return entry


def pack_glb(parts: list[Part], tree: dict[str, Any]) -> bytes:
    """Returns a file with one object.

    Args:
        parts: Its arrays, in the order of the accessors' indices.
        tree: The entries of the JSON part that are the file's own, at least one mesh.
    """
    views, offset = [], 0
    for part in parts:
        size = part.array.nbytes  # a multiple of four bytes
        views.append(
            {"buffer": 0, "byteOffset": offset, "byteLength": size, "target": part.purpose}
        )
        offset += size
    tree = {
        "asset": {"version": "2.0", "generator": "picardopt-3d"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "object"}],
        **tree,
        "accessors": [part.accessor(index) for index, part in enumerate(parts)],
        "bufferViews": views,
        "buffers": [{"byteLength": offset}],
    }
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(part.array.tobytes() for part in parts)
    return b"".join(
        [
            struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary)),
            struct.pack("<I4s", len(text), b"JSON"),
            text,
            struct.pack("<I4s", len(binary), b"BIN\0"),
            binary,
        ]
    )


def to_linear(colours: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Converts screen colours (sRGB, IEC 61966-2-1) to linear ones, as glTF requires for vertex colours."""
    low, high = colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4
    return np.where(colours <= 0.04045, low, high).astype(np.float32)
