"""Writes meshes to files: GLB for viewers and engines, OBJ and PLY for modeling tools.

The world has z up and its front along +x. A GLB is rotated to what glTF requires, y up and the front along +z. OBJ and
PLY, which require nothing, keep the world's axes unless `up` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from picardopt_3d.export.glb import INDICES, Part, pack_glb, to_linear
from picardopt_3d.export.mesh import Mesh
from picardopt_3d.io import replacing

Format = Literal["glb", "obj", "ply"]
Up = Literal["z", "y", "minus-y"]

_UP: dict[str, Up] = {"glb": "y", "obj": "z", "ply": "z"}


def save_mesh(mesh: Mesh, path: Path, format: Format | None = None, up: Up | None = None) -> None:
    """Writes a mesh with its colours and smooth normals, atomically.

    Args:
        mesh: The mesh.
        path: The file to write.
        format: The file's format; by default the one that the path's suffix names.
        up: The axis that points up in the file: "z" as in the world, or "y" or "minus-y" with the front along +z. By
            default what the format's readers expect: "y" for GLB (the only one that glTF allows), "z" for OBJ and PLY.

    Raises:
        ValueError: The format is unknown, or it does not allow `up`.
    """
    kind = path.suffix.lstrip(".").lower() if format is None else format
    if kind not in get_args(Format):
        raise ValueError(f"format={kind!r}: give one of {', '.join(get_args(Format))}")
    if kind == "glb" and up not in (None, "y"):
        raise ValueError(
            f"up={up!r} with format='glb': glTF has y up; leave it out, or write obj or ply"
        )
    content = mesh_bytes(mesh, kind, up or _UP[kind])  # type: ignore[arg-type]
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def mesh_bytes(mesh: Mesh, format: Format, up: Up) -> bytes:
    """Returns the content of a mesh's file, with its colours and smooth normals.

    Args:
        mesh: The mesh.
        format: The file's format.
        up: The axis that points up in the file; GLB requires "y".
    """
    vertices = turned(mesh.vertices, up)
    normals = turned(vertex_normals(mesh.vertices, mesh.faces), up)
    write: Callable[..., bytes] = {"glb": _glb, "obj": _obj, "ply": _ply}[format]
    return write(vertices, normals, mesh.faces, mesh.colours, up)


def turned(vectors: npt.NDArray[np.float32], up: Up) -> npt.NDArray[np.float32]:
    """Returns vectors of the world, `[count, 3]`, in the axes of a file."""
    if up == "z":
        return vectors
    # (front, left, up) = (x, y, z) in the world, (z, x, y) in glTF
    signs = np.array((1, 1, 1) if up == "y" else (-1, -1, 1), np.float32)
    return vectors[:, [1, 2, 0]] * signs


def vertex_normals(
    vertices: npt.NDArray[np.float32], faces: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Returns unit normals at the vertices, the area-weighted means of those of the faces.

    Args:
        vertices: Positions, `[vertices, 3]`.
        faces: Indices of three vertices each, `[faces, 3]`.

    Returns:
        `[vertices, 3]`
    """
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    around = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    corners, count = faces.ravel(), len(vertices)
    summed = np.stack([np.bincount(corners, around[:, i], count) for i in range(3)], axis=-1)
    length = np.linalg.norm(summed, axis=-1, keepdims=True)
    # A vertex whose faces have no area, or whose normals cancel, still needs a unit normal in glTF.
    unit = np.where(length > 1e-30, summed / np.maximum(length, 1e-30), (0.0, 0.0, 1.0))
    return unit.astype(np.float32)


def _glb(
    vertices: npt.NDArray[np.float32],
    normals: npt.NDArray[np.float32],
    faces: npt.NDArray[np.int64],
    colours: npt.NDArray[np.float32],
    up: Up,
) -> bytes:
    """Returns a binary glTF 2.0 file.

    It is not written by a library, because that would store sRGB colours as linear bytes and leave out the material:
    viewers would then show a washed-out metal.
    """
    parts = [
        Part(vertices.astype("<f4"), bounds=True),
        Part(normals.astype("<f4")),
        Part(to_linear(colours).astype("<f4")),
        Part(faces.astype("<u4").reshape(-1), INDICES),
    ]
    primitive = {
        "attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2},
        "indices": 3,
        "material": 0,
    }
    matt = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    materials = [{"pbrMetallicRoughness": matt, "name": "vertex colours"}]
    return pack_glb(parts, {"meshes": [{"primitives": [primitive]}], "materials": materials})


def _obj(
    vertices: npt.NDArray[np.float32],
    normals: npt.NDArray[np.float32],
    faces: npt.NDArray[np.int64],
    colours: npt.NDArray[np.float32],
    up: Up,
) -> bytes:
    """Returns a Wavefront OBJ file with the colour after each vertex, as Blender and MeshLab read it."""
    lines = [f"# picardopt-3d: {up} up, vertex colours (sRGB) behind the positions\n"]
    lines += [
        "v " + " ".join(f"{x:.7g}" for x in row) + "\n" for row in np.hstack([vertices, colours])
    ]
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}\n" for x, y, z in normals]
    lines += [f"f {a}//{a} {b}//{b} {c}//{c}\n" for a, b, c in (faces + 1).tolist()]
    return "".join(lines).encode()


def _ply(
    vertices: npt.NDArray[np.float32],
    normals: npt.NDArray[np.float32],
    faces: npt.NDArray[np.int64],
    colours: npt.NDArray[np.float32],
    up: Up,
) -> bytes:
    """Returns a binary PLY file with normals as floats and colours as bytes, which every reader supports."""
    numbers, channels = ("x", "y", "z", "nx", "ny", "nz"), ("red", "green", "blue")
    table = np.empty(
        len(vertices), [(name, "<f4") for name in numbers] + [(name, "u1") for name in channels]
    )
    for column, name in enumerate(numbers):
        table[name] = np.hstack([vertices, normals])[:, column]
    for column, name in enumerate(channels):
        table[name] = np.rint(colours[:, column] * 255)
    triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, faces
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment picardopt-3d: {up} up",
        f"element vertex {len(vertices)}",
        *(f"property float {name}" for name in numbers),
        *(f"property uchar {name}" for name in channels),
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    return "\n".join(header).encode() + table.tobytes() + triangles.tobytes()
