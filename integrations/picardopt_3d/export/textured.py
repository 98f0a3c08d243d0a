"""Writes meshes with a texture: binary glTF, and OBJ with a material and a picture beside it.

Axes are those of `mesh_files`: y up in glTF, which requires it, z up in OBJ unless `up` says otherwise. The texture
holds what a screen shows (sRGB), as glTF and OBJ want it; nothing should shade it, so that the materials are unlit.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, PngImagePlugin

from picardopt_3d.export.mesh_files import Up, turned, vertex_normals
from picardopt_3d.io import replacing
from picardopt_3d.scenes import TexturedMesh
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped

Format = Literal["glb", "obj"]

_OURS = "picardopt-3d"
"""Named in the material and in the picture beside an OBJ, so that another export may replace them."""

_UNLIT = "KHR_materials_unlit"
_CLAMPED = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}
"""Linear filters, and no repetition: what lies at one edge of the texture has nothing to do with the other edge."""


@dataclass(frozen=True, eq=False)
class TexturedFile:
    """A mesh with a texture, as files hold it.

    Attributes:
        vertices: Positions, world units, float32, `[vertices, 3]`.
        faces: Indices of three vertices each, counter-clockwise seen from outside, int64, `[faces, 3]`.
        coordinates: Texture coordinates from the left and from the top, in [0, 1], float32, `[count, 2]`.
        coordinate_faces: Indices of three texture coordinates for each face, int64, `[faces, 3]`.
        texture: The picture (sRGB), row 0 on top, uint8, `[size, size, 3]`.
    """

    vertices: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int64]
    coordinates: npt.NDArray[np.float32]
    coordinate_faces: npt.NDArray[np.int64]
    texture: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, triangles: Triangles, unwrapped: Unwrapped, colours: torch.Tensor) -> TexturedFile:
        """Returns what is written of a mesh.

        Args:
            triangles: The mesh.
            unwrapped: Where its triangles lie on the texture.
            colours: The texture, RGB in [0, 1], row 0 on top, `[size, size, 3]`.
        """
        tensors = [*triangles, *unwrapped, (colours.clamp(0, 1) * 255).round().byte()]
        return cls(*(tensor.detach().cpu().numpy() for tensor in tensors))

    @classmethod
    def of_scene(cls, scene: TexturedMesh) -> TexturedFile:
        """Returns what is written of a scene that has a texture."""
        return cls.of(scene.triangles(), scene.unwrapped(), scene.colours())


def save_textured(
    mesh: TexturedFile, path: Path, format: Format, up: Up | None = None
) -> list[Path]:
    """Writes a mesh with its texture, each file atomically.

    Args:
        mesh: The mesh.
        path: The file to write.
        format: "glb": one file. "obj": beside it the material (.mtl) and the texture (_texture.png), found by their
            names.
        up: The axis that points up in the file, see `save_mesh`.

    Returns:
        The files.

    Raises:
        ValueError: The format is unknown, or it does not allow `up`.
        FileExistsError: See `check_beside`.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format!r}: give one of {', '.join(get_args(Format))}")
    if format == "glb" and up not in (None, "y"):
        raise ValueError(f"up={up!r} with format='glb': glTF has y up; leave it out, or write obj")
    if format == "obj":
        check_beside(path)
    contents = {path: textured_glb(mesh)} if format == "glb" else _obj(mesh, path, up or "z")
    for file, content in contents.items():
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    return list(contents)


def check_beside(path: Path) -> None:
    """Checks that what is written beside an OBJ replaces no files but those of an earlier export.

    Args:
        path: The OBJ to write.

    Raises:
        FileExistsError: There is such a file, and it is something else.
    """
    picture, material = _beside(path)
    for file, is_ours in ((picture, _is_our_picture), (material, _is_our_material)):
        if file.exists() and not is_ours(file):
            raise FileExistsError(
                f"{file} is not of an earlier export, which would replace it: move it, or give another --out"
            )


def _beside(path: Path) -> tuple[Path, Path]:
    """Returns the paths of the texture and the material that belong to an OBJ."""
    stem = re.sub(r"\s", "_", path.stem)  # names in these files end at a space
    return path.with_name(f"{stem}_texture.png"), path.with_name(f"{stem}.mtl")


def _is_our_picture(path: Path) -> bool:
    """Returns whether an earlier export wrote a picture."""
    try:
        with Image.open(path) as image:
            return bool(image.info.get("Software") == _OURS)
    except OSError:  # no picture at all
        return False


def _is_our_material(path: Path) -> bool:
    """Returns whether an earlier export wrote a material."""
    return path.is_file() and path.read_bytes().startswith(f"# {_OURS}".encode())


def _png(mesh: TexturedFile) -> bytes:
    """Returns the texture as a PNG file."""
    said = PngImagePlugin.PngInfo()
    said.add_text("Software", _OURS)
    buffer = io.BytesIO()
    Image.fromarray(mesh.texture).save(buffer, "PNG", optimize=True, pnginfo=said)
    return buffer.getvalue()


def textured_glb(mesh: TexturedFile) -> bytes:
    """Returns a binary glTF 2.0 file; its vertices are split where the texture is cut."""
    # Imported here because it takes a second to import.
    import trimesh
    from trimesh.exchange import gltf
    from trimesh.visual import material, texture

    library: Any = SimpleNamespace(gltf=gltf, material=material, texture=texture)  # without types
    vertex = np.zeros(len(mesh.coordinates), np.int64)
    vertex[mesh.coordinate_faces] = mesh.faces
    normals = vertex_normals(mesh.vertices, mesh.faces)
    unlit = library.material.PBRMaterial(
        name="texture",
        baseColorTexture=Image.open(io.BytesIO(_png(mesh))),
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    # The library's texture coordinates go up; it turns them for glTF, whose go down as ours do.
    upwards = np.stack([mesh.coordinates[:, 0], 1 - mesh.coordinates[:, 1]], axis=1)
    written = trimesh.Trimesh(
        vertices=turned(mesh.vertices, "y")[vertex],
        faces=mesh.coordinate_faces,
        vertex_normals=turned(normals, "y")[vertex],
        visual=library.texture.TextureVisuals(uv=upwards, material=unlit),
        process=False,
        validate=False,
    )
    scene = trimesh.Scene()
    scene.add_geometry(written, node_name="object", geom_name="object")
    content: bytes = library.gltf.export_glb(scene, include_normals=True, tree_postprocessor=_unlit)
    return content


def _unlit(tree: dict[str, Any]) -> None:
    """Adds to the JSON part what the library does not write: that nothing shades the texture, and its edges."""
    for material in tree["materials"]:
        material.setdefault("extensions", {})[_UNLIT] = {}
    tree["extensionsUsed"] = sorted({*tree.get("extensionsUsed", []), _UNLIT})
    tree["samplers"] = [_CLAMPED]
    for texture in tree["textures"]:
        texture["sampler"] = 0


def _obj(mesh: TexturedFile, path: Path, up: Up) -> dict[Path, bytes]:
    """Returns the Wavefront files: the texture, the material that names it, and the mesh that names that.

    The mesh keeps its vertices whole: texture coordinates have indices of their own, and go up.
    """
    picture, material = _beside(path)
    lines = [f"# {_OURS}: {up} up\n", f"mtllib {material.name}\n", "usemtl texture\n"]
    lines += [f"v {x:.7g} {y:.7g} {z:.7g}\n" for x, y, z in turned(mesh.vertices, up)]
    normals = turned(vertex_normals(mesh.vertices, mesh.faces), up)
    lines += [f"vt {u:.7g} {1 - v:.7g}\n" for u, v in mesh.coordinates]
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}\n" for x, y, z in normals]
    both = np.stack([mesh.faces, mesh.coordinate_faces, mesh.faces], axis=2) + 1
    lines += [
        "f " + " ".join(f"{a}/{b}/{c}" for a, b, c in corners) + "\n" for corners in both.tolist()
    ]
    said = (
        f"# {_OURS}\nnewmtl texture\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 0\nmap_Kd {picture.name}\n"
    )
    return {picture: _png(mesh), material: said.encode(), path: "".join(lines).encode()}
