"""Files of meshes with a texture, opened again by hand and by trimesh: the right way up, unlit, and what was drawn."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.export.command import ExportConfig, main
from picardopt_3d.export.textured import TexturedFile, save_textured
from picardopt_3d.rendering import render_rgb
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    Tetrahedral,
    TetrahedralConfig,
    TexturedMesh,
    TexturedMeshConfig,
    Triangles,
    load_scene,
    save_scene,
)
from picardopt_3d.scenes.mesh.unwrap import Unwrapped
from picardopt_3d.world import SHAPES
from picardopt_3d.world.yardstick import psnr
from PIL import Image

from tests.integrations.helpers.analytic import Balls, voxels
from tests.integrations.meshes.test_textured import SMALL, quadrants, square

TURN = [2, 0, 1]  # from y up and the front along z, to z up and the front along x


@pytest.fixture(scope="module")
def ball() -> TexturedMesh:
    return TexturedMesh.from_scene(SMALL, Balls())


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary part of a GLB file, whose container is checked."""
    raw = path.read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", raw)
    assert (magic, version, length, kind, size % 4) == (b"glTF", 2, len(raw), b"JSON", 0)
    tree = json.loads(raw[20 : 20 + size], parse_constant=lambda name: pytest.fail(name))
    rest, kind = struct.unpack_from("<I4s", raw, 20 + size)
    binary = raw[28 + size :]
    assert (kind, rest) == (b"BIN\0", len(binary))
    assert 0 <= len(binary) - tree["buffers"][0]["byteLength"] < 4
    return tree, binary


def array(tree: dict[str, Any], binary: bytes, index: int) -> np.ndarray:
    """The content of an accessor, which is checked."""
    accessor = tree["accessors"][index]
    view = tree["bufferViews"][accessor["bufferView"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    assert start % 4 == 0
    assert "byteStride" not in view
    width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[accessor["type"]]
    kind = {5126: "<f4", 5125: "<u4", 5123: "<u2"}[accessor["componentType"]]
    count = accessor["count"] * width
    assert count * np.dtype(kind).itemsize <= view["byteLength"]
    found = np.frombuffer(binary, kind, count, start).reshape(-1, width)
    if "min" in accessor:
        assert np.allclose([accessor["min"], accessor["max"]], [found.min(0), found.max(0)])
    return found


def reread(vertices: np.ndarray, faces: np.ndarray, places: np.ndarray, image: Any) -> TexturedMesh:
    """A scene of what a file holds: places from the left and from the top, one for each vertex."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).float() / 255
    # Whole again where the texture is cut, for the antialiasing: there it would take the cuts for silhouettes.
    vertices, joined = np.unique(vertices.round(6), axis=0, return_inverse=True)
    whole = torch.from_numpy(joined.reshape(-1)[faces].astype(np.int64))
    faces = torch.from_numpy(np.array(faces, np.int64))
    return TexturedMesh(
        TexturedMeshConfig(texture=len(pixels)),
        Triangles(torch.from_numpy(np.array(vertices, np.float32)), whole),
        Unwrapped(torch.from_numpy(np.array(places, np.float32)), faces),
        pixels,
    )


def by_trimesh(path: Path) -> tuple[trimesh.Trimesh, np.ndarray, Any]:
    """What trimesh reads: the mesh, places from the left and from the top, and the picture."""
    loaded = trimesh.load(path, process=False)
    [mesh] = loaded.geometry.values() if isinstance(loaded, trimesh.Scene) else [loaded]
    material = mesh.visual.material
    image = getattr(material, "baseColorTexture", None) or material.image
    places = np.stack([mesh.visual.uv[:, 0], 1 - mesh.visual.uv[:, 1]], axis=1)
    return mesh, places, image


def assert_looks_like(found: TexturedMesh, scene: TexturedMesh) -> None:
    cameras = turntable_cameras(4, elevation=20.0)
    assert psnr(render_rgb(found, cameras, 64), render_rgb(scene, cameras, 64)) >= 40


def test_a_glb_by_hand(ball: TexturedMesh, tmp_path: Path) -> None:
    [path] = save_textured(TexturedFile.of_scene(ball), tmp_path / "ball.glb", "glb")
    tree, binary = parts(path)
    assert tree["asset"]["version"] == "2.0"
    [mesh] = tree["meshes"]
    [primitive] = mesh["primitives"]
    assert primitive.get("mode", 4) == 4
    named = primitive["attributes"]
    assert named.keys() >= {"POSITION", "NORMAL", "TEXCOORD_0"}
    places, normals, at = (
        array(tree, binary, named[name]) for name in ("POSITION", "NORMAL", "TEXCOORD_0")
    )
    assert "min" in tree["accessors"][named["POSITION"]]  # required there
    faces = array(tree, binary, primitive["indices"]).reshape(-1, 3)
    assert faces.max() < len(places) == len(normals) == len(at)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert ((normals * places).sum(1) > 0).all()  # outward still
    corners = places[faces]
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert ((area * corners[:, 0]).sum(1) > 0).mean() > 0.99
    # Unlit, not a metal, the texture as screens show it, not repeated.
    material = tree["materials"][primitive["material"]]
    assert material["extensions"] == {"KHR_materials_unlit": {}}
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]
    assert "extensionsRequired" not in tree
    shown = material["pbrMetallicRoughness"]
    assert shown["metallicFactor"] == 0
    assert shown.get("baseColorFactor", [1, 1, 1, 1]) == [1, 1, 1, 1]
    texture = tree["textures"][shown["baseColorTexture"]["index"]]
    sampler = tree["samplers"][texture["sampler"]]
    assert (sampler["wrapS"], sampler["wrapT"], sampler["magFilter"]) == (33071, 33071, 9729)
    image = tree["images"][texture["source"]]
    assert image["mimeType"] == "image/png"
    view = tree["bufferViews"][image["bufferView"]]
    content = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    picture = Image.open(io.BytesIO(content))
    expected = (ball.colours() * 255).round().byte().detach().numpy()
    assert np.array_equal(np.asarray(picture), expected)
    # Nodes do not move it.
    node = tree["nodes"][-1]
    matrix = node.get("matrix", np.eye(4).ravel().tolist())
    assert np.array_equal(matrix, np.eye(4).ravel())
    # The front, +x in the world, is +z; up is +y: drawn again it looks the same.
    assert_looks_like(reread(places[:, TURN], faces, at, picture), ball)


def test_a_glb_by_trimesh(ball: TexturedMesh, tmp_path: Path) -> None:
    save_textured(TexturedFile.of_scene(ball), tmp_path / "ball.glb", "glb")
    mesh, places, image = by_trimesh(tmp_path / "ball.glb")
    assert len(mesh.faces) == len(ball.faces)
    assert_looks_like(reread(mesh.vertices[:, TURN], mesh.faces, places, image), ball)
    # The ball's colours are 0.5 + the world's coordinates: trimesh's own look-up knows which way is up.
    colours = mesh.visual.to_color().vertex_colors[:, :3] / 255
    assert np.abs(colours - (mesh.vertices[:, TURN] + 0.5)).max() < 0.08


@pytest.mark.parametrize(("up", "turn"), [(None, [0, 1, 2]), ("y", TURN), ("minus-y", TURN)])
def test_an_obj_by_hand_and_by_trimesh(
    ball: TexturedMesh, tmp_path: Path, up: Any, turn: list[int]
) -> None:
    path = tmp_path / "a ball.obj"
    files = save_textured(TexturedFile.of_scene(ball), path, "obj", up)
    assert sorted(file.name for file in files) == ["a ball.obj", "a_ball.mtl", "a_ball_texture.png"]
    lines = path.read_text().splitlines()
    assert "mtllib a_ball.mtl" in lines
    material = (tmp_path / "a_ball.mtl").read_text().splitlines()
    assert "newmtl texture" in material
    assert "usemtl texture" in lines
    assert "map_Kd a_ball_texture.png" in material
    assert "illum 0" in material
    assert len([line for line in lines if line.startswith("v ")]) == len(ball.vertices)  # whole
    signs = np.array([1, -1, -1]) if up == "minus-y" else 1
    # By hand: `vt` counts from the bottom.
    rows: dict[str, list[list[str]]] = {}
    for line in lines:
        kind, *values = line.split()
        rows.setdefault(kind, []).append(values)
    at = np.array(rows["vt"], float)
    corners = np.array([[corner.split("/") for corner in row] for row in rows["f"]], int) - 1
    vertices = np.array(rows["v"], float)[:, turn] * signs
    picture = Image.open(tmp_path / "a_ball_texture.png")
    places = np.stack([at[:, 0], 1 - at[:, 1]], axis=1)[corners[..., 1].reshape(-1)]
    split = vertices[corners[..., 0].reshape(-1)]
    assert_looks_like(reread(split, np.arange(len(split)).reshape(-1, 3), places, picture), ball)
    mesh, places, image = by_trimesh(path)
    assert_looks_like(reread(mesh.vertices[:, turn] * signs, mesh.faces, places, image), ball)
    solid = trimesh.Trimesh(vertices, corners[..., 0], process=False)
    assert solid.is_watertight
    assert solid.volume > 0


@pytest.mark.parametrize("format", ["glb", "obj"])
def test_the_four_corners_of_a_square(tmp_path: Path, format: Any) -> None:
    """Seen from the front: red top left, green top right, blue bottom left, white bottom right."""
    scene = TexturedMesh(replace(SMALL, texture=16), *square(), quadrants())
    path = tmp_path / f"square.{format}"
    save_textured(TexturedFile.of_scene(scene), path, format)
    mesh, _, _ = by_trimesh(path)
    turn = TURN if format == "glb" else [0, 1, 2]
    colours = mesh.visual.to_color().vertex_colors[:, :3]
    seen = {
        (y > 0, z > 0): tuple(colour)
        for (_, y, z), colour in zip(mesh.vertices[:, turn], colours, strict=True)
    }
    # Looking along -x with z up, +y is on the right.
    expected = {
        (False, True): (255, 0, 0),
        (True, True): (0, 255, 0),
        (False, False): (0, 0, 255),
        (True, False): (255, 255, 255),
    }
    for place, colour in expected.items():
        assert np.abs(np.subtract(seen[place], colour, dtype=int)).max() <= 1, place


def test_what_a_file_cannot_have_is_refused(ball: TexturedMesh, tmp_path: Path) -> None:
    file = TexturedFile.of_scene(ball)
    with pytest.raises(ValueError, match="glTF has y up"):
        save_textured(file, tmp_path / "a.glb", "glb", "z")
    with pytest.raises(ValueError, match="format='ply'"):
        save_textured(file, tmp_path / "a.ply", "ply")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a_ball_texture.png", "a_ball.mtl"])
def test_files_of_others_beside_an_obj_are_not_replaced(
    ball: TexturedMesh, tmp_path: Path, name: str
) -> None:
    file, path = TexturedFile.of_scene(ball), tmp_path / "a ball.obj"
    (tmp_path / "a_ball.png").write_bytes(b"a picture")  # has nothing to do with it
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=f"{name} is not of an earlier export"):
        save_textured(file, path, "obj")
    assert (tmp_path / name).read_bytes() == b"somebody's"
    assert not path.exists()
    (tmp_path / name).unlink()
    save_textured(file, path, "obj")
    first = path.read_bytes()
    assert len(save_textured(file, path, "obj")) == 3  # its own are
    assert path.read_bytes() == first
    assert (tmp_path / "a_ball.png").read_bytes() == b"a picture"


# By the command.


def export(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_a_run_whose_scene_has_a_texture(
    ball: TexturedMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_scene(ball, tmp_path / "scene.safetensors")
    file = tmp_path / "scene.safetensors"
    export(file)
    assert "texture of 64 pixels" in capsys.readouterr().out
    mesh, places, image = by_trimesh(tmp_path / "mesh.glb")
    assert_looks_like(reread(mesh.vertices[:, TURN], mesh.faces, places, image), ball)
    export(file, "--out", tmp_path / "mesh.obj")
    assert "with mesh_texture.png and mesh.mtl beside it" in capsys.readouterr().out
    export(file, "--out", tmp_path / "mesh.ply")
    points = trimesh.load(tmp_path / "mesh.ply", process=False)
    assert len(points.vertices) == len(ball.vertices)
    colours = points.visual.vertex_colors[:, :3] / 255
    assert np.abs(colours - (points.vertices + 0.5)).max() < 0.06
    for options, said in (
        (["--faces", "100"], "--faces changes the mesh"),
        (["--components", "1"], "--components changes the mesh"),
        (["--faces", "100", "--components", "1"], "--components and --faces change the mesh"),
        (["--faces", "100"], "give --texture 64 too"),
        (["--level", "0.1"], "--level: of no use for a TexturedMesh"),
    ):
        with pytest.raises(SystemExit):
            export(file, *options)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="format ply: it holds no texture; give glb or obj"):
        ExportConfig(file, texture=64, format="ply")
    export(file, "--faces", 300, "--texture", 32, "--out", tmp_path / "less.glb")
    mesh, _, image = by_trimesh(tmp_path / "less.glb")
    assert len(mesh.faces) < len(ball.faces)
    assert image.size == (32, 32)


def test_files_of_others_are_found_before_the_texture_is_made(
    ball: TexturedMesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_scene(ball, tmp_path / "scene.safetensors")
    (tmp_path / "mug_texture.png").write_bytes(b"somebody's")
    out = tmp_path / "mug.obj"
    for options in ([], ["--texture", 32]):
        with pytest.raises(SystemExit):
            export(tmp_path / "scene.safetensors", "--out", out, *options)
        said = capsys.readouterr().err
        assert "mug_texture.png is not of an earlier export" in said
        assert "unwrap" not in said
    assert not out.exists()


def test_a_bar_that_does_not_move_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The colours of triangles are asked for themselves, not taken from views."""
    grid = Tetrahedral(TetrahedralConfig(resolution=8, radius=0.6, background="solid"))
    save_scene(grid, tmp_path / "scene.safetensors")
    export(tmp_path / "scene.safetensors", "--texture", 32)
    said = capsys.readouterr().err
    assert "unwrap: 100%" in said
    assert "bake" not in said


def test_triangles_of_a_grid_are_exported_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Tetrahedral(TetrahedralConfig(resolution=8, radius=0.6, background="solid"))
    save_scene(grid, tmp_path / "scene.safetensors")
    export(tmp_path / "scene.safetensors", "--out", tmp_path / "mesh.ply")
    mesh = trimesh.load(tmp_path / "mesh.ply", process=False)
    shell = grid.shell()
    assert np.array_equal(mesh.vertices, shell.triangles.vertices.numpy())
    assert np.array_equal(mesh.faces, shell.triangles.faces.numpy())
    expected = shell.colour(shell.triangles.vertices).detach().numpy()
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - expected).max() < 0.01
    with pytest.raises(SystemExit):
        export(tmp_path / "scene.safetensors", "--resolution", 64)
    assert "--resolution: of no use for a Tetrahedral" in capsys.readouterr().err


def test_any_scene_is_unwrapped_and_baked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mug = voxels(SHAPES["mug"], (0.9, 0.5, 0.1), 24)
    save_scene(mug, tmp_path / "mug.safetensors")
    export(
        tmp_path / "mug.safetensors", "--texture", 64, "--faces", 800, "--resolution", 32,
        "--out", tmp_path / "mug.glb",
    )  # fmt: skip
    said = capsys.readouterr()
    assert "texture of 64 pixels" in said.out
    for bar in ("surface: 100%", "unwrap: 100%", "bake: 100%"):
        assert bar in said.err
    mesh, places, image = by_trimesh(tmp_path / "mug.glb")
    scene = reread(mesh.vertices[:, TURN], mesh.faces, places, image)
    cameras = turntable_cameras(4, elevation=20.0)
    views = (render_rgb(each, cameras, 64, (1.0, 1.0, 1.0)) for each in (scene, mug))
    assert psnr(*views) >= 22
    torch.manual_seed(0)
    few = Gaussians(GaussiansConfig(count=60, opacity=0.9))
    save_scene(few, tmp_path / "few.safetensors")
    export(
        tmp_path / "few.safetensors", "--texture", 32, "--resolution", 24,
        "--out", tmp_path / "few.obj",
    )  # fmt: skip
    assert "cut out of the density of 60 Gaussians" in capsys.readouterr().out
    _, _, image = by_trimesh(tmp_path / "few.obj")
    assert np.abs(np.asarray(image)[..., :3].astype(int) - 128).max() <= 2  # they are grey
    assert isinstance(load_scene(tmp_path / "few.safetensors"), Gaussians)
