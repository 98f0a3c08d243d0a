"""Meshes: where they lie, that they are closed, and that files hold what was cut out, by independent readers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from picardopt_3d.export.command import main
from picardopt_3d.export.glb import to_linear
from picardopt_3d.export.mesh import Mesh, extract_mesh
from picardopt_3d.export.mesh_files import save_mesh, vertex_normals
from picardopt_3d.scenes import NerfConfig, NerfField, SdfConfig, SdfField, save_scene
from picardopt_3d.scenes.mesh.cleaning import largest_components
from picardopt_3d.scenes.mesh.extract import points_of
from picardopt_3d.scenes.mesh.surfaces import NoSurfaceError
from picardopt_3d.world import SHAPES
from plyfile import PlyData

from tests.integrations.helpers.analytic import Balls, voxels

BALL = 4 / 3 * math.pi * 0.4**3


def solid(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.fixture(scope="module")
def ball() -> Mesh:
    return extract_mesh(Balls(), 32)


def test_a_ball_is_where_it_is_closed_and_faces_outward(ball: Mesh) -> None:
    shape = solid(ball)
    assert shape.is_watertight
    assert shape.is_winding_consistent
    assert shape.volume == pytest.approx(BALL, rel=0.01)  # negative if faces were turned inside
    distance = np.linalg.norm(ball.vertices, axis=1)
    assert np.abs(distance - 0.4).max() < 2e-3
    assert np.allclose(ball.colours, ball.vertices + 0.5, atol=1e-6)
    cosine = (vertex_normals(ball.vertices, ball.faces) * ball.vertices).sum(1) / distance
    assert cosine.min() > 0.99


def test_axes_are_not_mixed_up() -> None:
    mesh = extract_mesh(Balls([(0.1, -0.2, 0.3, 0.1)]), 48)
    assert np.allclose(mesh.vertices.mean(0), (0.1, -0.2, 0.3), atol=3e-3)
    chair = extract_mesh(voxels(SHAPES["chair"], (0.1, 0.2, 0.9), 48), 96)
    back = chair.vertices[chair.vertices[:, 2] > 0.1]
    assert back[:, 0].max() < -0.1  # along -x
    assert np.abs(chair.colours - (0.1, 0.2, 0.9)).max() < 1e-3


def test_the_level_moves_the_surface() -> None:
    for level in (-0.05, 0.1):
        mesh = extract_mesh(Balls(), 32, level=level)
        assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - (0.4 - level)).max() < 3e-3


def test_what_reaches_out_of_the_sphere_is_cut_off_there_and_closed() -> None:
    mesh = extract_mesh(Balls([(0.45, 0.0, 0.0, 0.3)]), 64)
    shape = solid(mesh)
    assert shape.is_watertight
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.5 + 1e-6
    # The lens that two balls of radii 0.5 and 0.3 have in common, 0.45 apart.
    r, s, d = 0.5, 0.3, 0.45
    lens = math.pi * (r + s - d) ** 2 * (d * d + 2 * d * (r + s) - 3 * (r - s) ** 2) / (12 * d)
    assert shape.volume == pytest.approx(lens, rel=0.02)


def test_the_grid_is_finer_at_a_higher_resolution() -> None:
    coarse, fine = (
        np.abs(np.linalg.norm(extract_mesh(Balls(), n).vertices, axis=1) - 0.4).max()
        for n in (16, 64)
    )
    assert fine < coarse / 8  # the error falls with the square of the spacing


def test_progress_adds_up() -> None:
    told: list[int] = []
    extract_mesh(Balls(), 80, progress=told.append)
    assert len(told) > 1
    assert sum(told) == points_of(80)
    assert points_of(80) == pytest.approx(math.pi / 6 * 77**3, rel=0.01)


def test_the_largest_pieces_are_kept() -> None:
    three = Balls([(0.2, 0.0, 0.0, 0.2), (-0.25, 0.0, 0.0, 0.1), (0.0, 0.0, 0.4, 0.05)])
    volumes = [4 / 3 * math.pi * radius**3 for radius in (0.2, 0.1, 0.05)]
    for count in (1, 2, 3, 4):
        mesh = extract_mesh(three, 64, components=count)
        assert solid(mesh).body_count == min(count, 3)
        assert solid(mesh).volume == pytest.approx(sum(volumes[:count]), rel=0.03)
        assert np.allclose(mesh.colours, np.clip(mesh.vertices + 0.5, 0, 1), atol=1e-6)
    # By area, not by the number of faces: one large triangle against two small ones.
    corners = np.array(
        [[0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5], [1, 1, 5.0]]
    )
    kept, faces = largest_components(corners, np.array([[3, 4, 5], [4, 6, 5], [0, 1, 2]]), 1)
    assert kept.tolist() == corners[:3].tolist()
    assert faces.tolist() == [[0, 1, 2]]


def test_a_simpler_mesh_is_the_same_shape() -> None:
    full, simple = extract_mesh(Balls(), 48), extract_mesh(Balls(), 48, faces=1000)
    assert len(full.faces) > 5000
    assert len(simple.faces) == pytest.approx(1000, abs=100)
    assert solid(simple).is_watertight
    assert solid(simple).volume == pytest.approx(BALL, rel=0.02)
    assert np.allclose(simple.colours, simple.vertices + 0.5, atol=1e-6)
    assert len(extract_mesh(Balls(), 16, faces=10**6).faces) == len(extract_mesh(Balls(), 16).faces)


def test_simplifying_does_not_take_the_handle_off_a_mug() -> None:
    scene = voxels(SHAPES["mug"], (0.9, 0.5, 0.1), 48)
    full, simple = extract_mesh(scene, 96), extract_mesh(scene, 96, faces=500)
    assert len(simple.faces) < len(full.faces) / 5
    assert np.abs(simple.vertices.max(0) - full.vertices.max(0)).max() < 0.01
    assert solid(simple).is_watertight
    assert solid(simple).volume == pytest.approx(solid(full).volume, rel=0.02)


def test_real_scenes_have_surfaces() -> None:
    sphere = SdfField(SdfConfig())
    mesh = solid(extract_mesh(sphere, 32))
    assert mesh.is_watertight
    radius = sphere.config.surface_radius
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.1)
    blob = solid(extract_mesh(NerfField(NerfConfig()), 32, level=-5.0))
    assert blob.is_watertight
    assert blob.volume > 0


@pytest.mark.parametrize(
    ("scene", "options", "said"),
    [
        (Balls(), {"level": 0.41}, r"no surface there; .* to 0\.\d+\. Give a lower level"),
        (Balls([(0.0, 0.0, 0.0, 2.0)]), {}, "all of the scene's sphere .* Give a higher level"),
        (Balls([(math.nan, 0.0, 0.0, 0.4)]), {}, "not finite: its optimization diverged"),
        (Balls(), {"resolution": 7}, "resolution=7: give at least 8"),
        (Balls(), {"components": 0}, "components=0: give at least 1"),
        (Balls(), {"faces": 3}, "faces=3: give at least 4"),
    ],
)
def test_what_cannot_be_cut_out_says_what_to_change(scene: Balls, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        extract_mesh(scene, **({"resolution": 16} | options))


@pytest.mark.parametrize("balls", [[(0.0, 0.0, 0.0, -0.1)], [(0.0, 0.0, 0.0, 2.0)]])
def test_the_level_that_is_suggested_has_a_surface(balls: list) -> None:
    with pytest.raises(NoSurfaceError) as caught:
        extract_mesh(Balls(balls), 32)
    level = float(str(caught.value).split("such as ")[1].split(", or")[0].rstrip("."))
    assert len(extract_mesh(Balls(balls), 32, level=level).faces) > 0


# Files, opened again by other readers.


def test_glb_by_hand_and_by_trimesh(ball: Mesh, tmp_path: Path) -> None:
    save_mesh(ball, tmp_path / "ball.glb")
    raw = (tmp_path / "ball.glb").read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", raw)
    assert (magic, version, length, kind) == (b"glTF", 2, len(raw), b"JSON")
    tree = json.loads(raw[20 : 20 + size])
    rest, kind = struct.unpack_from("<I4s", raw, 20 + size)
    binary = raw[28 + size :]
    assert (kind, rest, tree["buffers"][0]["byteLength"]) == (b"BIN\0", len(binary), len(binary))

    def read(index: int) -> np.ndarray:
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        width = {"SCALAR": 1, "VEC3": 3}[accessor["type"]]
        kind = {5126: "<f4", 5125: "<u4"}[accessor["componentType"]]
        part = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        return np.frombuffer(part, kind).reshape(accessor["count"], width)

    primitive = tree["meshes"][0]["primitives"][0]
    named = primitive["attributes"]
    places, normals, light = (read(named[name]) for name in ("POSITION", "NORMAL", "COLOR_0"))
    faces = read(primitive["indices"]).reshape(-1, 3)
    assert np.array_equal(faces, ball.faces)
    assert np.array_equal(places[:, [2, 0, 1]], ball.vertices)  # up along y, front along z
    bounds = tree["accessors"][named["POSITION"]]
    assert np.array_equal([bounds["min"], bounds["max"]], [places.min(0), places.max(0)])
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert ((normals * places).sum(1) > 0).all()  # outward still
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.allclose(shown, ball.colours, atol=1e-5)
    assert tree["materials"][primitive["material"]]["pbrMetallicRoughness"]["metallicFactor"] == 0

    [again] = trimesh.load(tmp_path / "ball.glb", process=False).geometry.values()
    assert again.is_watertight
    assert again.volume == pytest.approx(BALL, rel=0.01)
    assert np.allclose(again.visual.vertex_attributes["color"][:, :3], light, atol=1e-6)


def test_linear_light_is_the_inverse_of_the_screens() -> None:
    shown = np.array([0.0, 0.02, 0.5, 1.0], dtype=np.float32)
    assert np.allclose(to_linear(shown), [0.0, 0.02 / 12.92, 0.21404, 1.0], atol=1e-5)


def test_ply_by_plyfile(ball: Mesh, tmp_path: Path) -> None:
    save_mesh(ball, tmp_path / "ball.ply")
    content = PlyData.read(tmp_path / "ball.ply")
    vertex = content["vertex"]
    places = np.stack([vertex[name] for name in "xyz"], axis=-1)
    assert np.array_equal(places, ball.vertices)
    colours = np.stack([vertex[name] for name in ("red", "green", "blue")], axis=-1)
    assert colours.dtype == np.uint8
    assert np.abs(colours / 255 - ball.colours).max() < 0.5 / 255 + 1e-6
    normals = np.stack([vertex[name] for name in ("nx", "ny", "nz")], axis=-1)
    assert np.array_equal(normals, vertex_normals(ball.vertices, ball.faces))
    assert np.array_equal(np.vstack(content["face"]["vertex_indices"]), ball.faces)
    assert "z up" in content.comments[0]


def test_obj_by_hand_and_by_trimesh(ball: Mesh, tmp_path: Path) -> None:
    save_mesh(ball, tmp_path / "ball.obj")
    rows: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "ball.obj").read_text().splitlines():
        kind, *values = line.split()
        rows.setdefault(kind, []).append(values)
    numbers = np.array(rows["v"], dtype=float)
    assert np.allclose(numbers[:, :3], ball.vertices, atol=1e-6)
    assert np.allclose(numbers[:, 3:], ball.colours, atol=1e-6)
    assert np.allclose(
        np.array(rows["vn"], dtype=float), vertex_normals(ball.vertices, ball.faces), atol=1e-4
    )
    corners = [[corner.split("//") for corner in face] for face in rows["f"]]
    assert np.array_equal(np.array(corners, dtype=int)[..., 0] - 1, ball.faces)
    assert np.array_equal(np.array(corners, dtype=int)[..., 1] - 1, ball.faces)
    again = trimesh.load(tmp_path / "ball.obj", process=False)
    assert again.volume == pytest.approx(BALL, rel=0.01)
    assert np.abs(again.visual.vertex_colors[:, :3] / 255 - ball.colours).max() < 1 / 255


def test_up_is_as_asked_for(tmp_path: Path) -> None:
    mesh = extract_mesh(Balls([(0.1, -0.2, 0.3, 0.1)]), 32)
    centres = {}
    files = {"z.ply": "z", "down.obj": "minus-y", "y.ply": "y", "y.obj": "y", "y.glb": "y"}
    for name, up in files.items():
        save_mesh(mesh, tmp_path / name, up=up)
        shape = trimesh.load(tmp_path / name, force="mesh", process=False)
        assert shape.volume > 0  # a mirror image would be inside out
        centres[name] = shape.vertices.mean(0).round(2).tolist()
    assert centres.pop("z.ply") == [0.1, -0.2, 0.3]
    assert centres.pop("down.obj") == [0.2, -0.3, 0.1]
    assert list(centres.values()) == [[-0.2, 0.3, 0.1]] * 3
    for wrong in ("z", "minus-y"):
        with pytest.raises(ValueError, match="glTF has y up"):
            save_mesh(mesh, tmp_path / "z.glb", up=wrong)
    with pytest.raises(ValueError, match="format='stl': give one of glb, obj, ply"):
        save_mesh(mesh, tmp_path / "a.stl")
    assert not list(tmp_path.glob("*.stl"))


def test_a_vertex_without_area_has_a_unit_normal() -> None:
    flat = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], dtype=np.float32)
    mesh = Mesh(flat, np.array([[0, 1, 2]]), flat)
    assert np.allclose(np.linalg.norm(vertex_normals(mesh.vertices, mesh.faces), axis=1), 1)


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cube"
    folder.mkdir()
    save_scene(voxels(SHAPES["cube"], (0.9, 0.1, 0.1)), folder / "scene.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["glb", "obj", "ply"])
def test_the_command_writes_each_format(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--format", kind, "--resolution", "64"])
    shape = trimesh.load(run / f"mesh.{kind}", force="mesh", process=False)
    assert shape.is_watertight
    assert shape.volume == pytest.approx(0.58**3, rel=0.05)
    told = capsys.readouterr()
    assert told.out == (
        f"{run / f'mesh.{kind}'}: {len(shape.vertices)} vertices, {len(shape.faces)} triangles\n"
    )
    assert "surface" in told.err  # the progress bar


def test_the_command_takes_a_scene_file_and_a_place(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.ply"
    scene = str(run / "scene.safetensors")
    main([scene, "--out", str(out), "--resolution", "32", "--faces", "1000", "--components", "1"])
    assert len(PlyData.read(out)["face"].data) <= 1100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "no finished run: it has no scene.safetensors"),
        (
            ["RUN", "--out", "a.stl"],
            "its suffix names no format; end it in .glb, .obj, .ply, .splat",
        ),
        (["RUN", "--up", "z"], "glTF has y up"),
        (["RUN", "--up", "minus-y", "--format", "splats-glb"], "glTF has y up"),
        (
            ["RUN", "--format", "splat"],
            "is a RadianceField, which holds no Gaussians; give glb, obj",
        ),
        (["RUN", "--out", "a.splat"], "format splat: "),
        (["RUN", "--resolution", "2"], "resolution=2: give at least 8"),
        (["RUN", "--level", "1e9"], "Give a lower level"),
        (["RUN", "--format", "glb", "--out", "."], "is a folder: give the file to write"),
        (["noise.bin"], "noise.bin"),
    ],
)
def test_the_command_says_what_is_wrong(
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.bin").write_bytes(b"no scene at all, but long enough for a header")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main([str(run) if word == "RUN" else word for word in arguments])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "picardopt export" in told
    assert said in " ".join(told.split())
    assert sorted(tmp_path.iterdir()) == before


def test_gradients_are_not_kept_and_the_mesh_is_of_the_scene_as_it_is() -> None:
    scene = Balls()
    extract_mesh(scene, 16)
    assert scene.balls.grad is None
    with torch.no_grad():
        scene.balls[0, 3] = 0.2
    assert np.linalg.norm(extract_mesh(scene, 32).vertices, axis=1).max() < 0.21
