"""Files of Gaussians, opened again by readers that are not ours."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import gsply
import numpy as np
import pytest
import splatset
import torch
import trimesh
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.export.splats import save_splats
from picardopt_3d.scenes.gaussians.harmonics import harmonic_basis
from picardopt_3d.scenes.gaussians.rasterize import rasterize
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats
from plyfile import PlyData
from scipy.spatial.transform import Rotation

from tests.integrations.helpers.splats import random_splats

INRIA = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 "
    + " ".join(f"f_rest_{i}" for i in range(45))
    + " opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
).split()


def some_splats(count: int, *, degree: int = 0) -> Splats:
    return random_splats(count, degree=degree, dtype=torch.float32)


def unit(rotations: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(rotations.double(), dim=1).numpy()


def strict(path: Path) -> np.ndarray:
    """The rows of a file that is laid out to the byte as 3D Gaussian Splatting's, else an error."""
    raw = path.read_bytes()
    end = raw.index(b"end_header\n") + len(b"end_header\n")
    lines = raw[:end].decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    word, count = lines[2].rsplit(" ", 1)
    assert word == "element vertex"
    assert lines[3:-1] == [f"property float {name}" for name in INRIA]
    assert len(raw) == end + 248 * int(count)
    return np.array(list(struct.iter_unpack("<62f", raw[end:])))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_by_a_strict_reader_and_by_plyfile(degree: int, tmp_path: Path) -> None:
    splats = some_splats(50, degree=degree)
    save_splats(splats, tmp_path / "a.ply", "ply")
    rows = strict(tmp_path / "a.ply")
    assert np.array_equal(rows[:, :3], splats.means)
    assert (rows[:, 3:6] == 0).all()
    assert np.array_equal(rows[:, 6:9], splats.colours)
    harmonics = rows[:, 9:54].reshape(50, 3, 15).swapaxes(1, 2)
    given = splats.harmonics.shape[1]
    assert np.array_equal(harmonics[:, :given], splats.harmonics)
    assert (harmonics[:, given:] == 0).all()
    assert np.array_equal(rows[:, 54], splats.opacity_logits)
    assert np.array_equal(rows[:, 55:58], splats.log_scales)
    assert np.allclose(rows[:, 58:], unit(splats.rotations), atol=1e-7)

    content = PlyData.read(tmp_path / "a.ply")
    assert [element.name for element in content.elements] == ["vertex"]
    assert content["vertex"].data.dtype.names == tuple(INRIA)
    assert np.array_equal(np.stack([content["vertex"][name] for name in INRIA], axis=1), rows)


@pytest.mark.parametrize("degree", [0, 3])
def test_ply_by_a_reader_of_gaussians(degree: int, tmp_path: Path) -> None:
    splats = some_splats(50, degree=degree)
    save_splats(splats, tmp_path / "a.ply", "ply")
    found = gsply.plyread(tmp_path / "a.ply")
    assert np.array_equal(found.means, splats.means)
    assert np.array_equal(found.scales, splats.log_scales)
    assert np.allclose(found.quats, unit(splats.rotations), atol=1e-7)
    assert np.array_equal(found.opacities, splats.opacity_logits)
    assert np.array_equal(found.sh0, splats.colours)
    harmonics = np.asarray(found.shN).reshape(50, 15, 3)
    given = splats.harmonics.shape[1]
    assert np.array_equal(harmonics[:, :given], splats.harmonics)
    assert (harmonics[:, given:] == 0).all()


def test_splat_by_a_reader_of_gaussians(tmp_path: Path) -> None:
    splats = some_splats(200, degree=1)
    save_splats(splats, tmp_path / "a.splat", "splat")
    assert (tmp_path / "a.splat").stat().st_size == 32 * 200
    found = splatset.load_file(tmp_path / "a.splat")
    volume = splats.log_scales.double().sum(1).exp()
    order = (-volume * splats.opacity_logits.double().sigmoid()).argsort(stable=True)
    splats = Splats(*(tensor[order] for tensor in splats))  # the most opaque and large first
    assert np.array_equal(found.positions, splats.means)
    assert np.allclose(found.scales, splats.log_scales.exp(), rtol=1e-6)
    shown = (0.5 + SH_C0 * splats.colours).clamp(0, 1).numpy()
    assert np.abs(found.rgb / 255 - shown).max() < 0.5 / 255 + 1e-6
    assert np.abs(found.opacity - splats.opacity_logits.sigmoid().numpy()).max() < 0.5 / 255 + 1e-6
    assert np.abs(found.rotations - unit(splats.rotations)).max() < 0.02


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return -10 * math.log10(max(float((one - other).square().mean()), 1e-20))


def pictures(splats: Splats, degree: int = 0) -> torch.Tensor:
    """Eight views from around, colour and opacity."""
    cameras = turntable_cameras(8)
    seen = rasterize(Splats(*(t.float() for t in splats)), cameras, 64, 64, degree=degree)
    return torch.cat([seen.colour, seen.opacity], dim=1)


@pytest.mark.parametrize("degree", [0, 3])
def test_what_others_read_from_ply_looks_the_same(degree: int, tmp_path: Path) -> None:
    splats = some_splats(500, degree=degree)
    save_splats(splats, tmp_path / "a.ply", "ply")
    found = gsply.plyread(tmp_path / "a.ply")
    harmonics = np.asarray(found.shN).reshape(500, 15, 3)
    columns = (found.means, found.scales, found.quats, found.opacities, found.sh0, harmonics)
    again = Splats(*(torch.from_numpy(np.array(column)) for column in columns))
    assert psnr(pictures(again, 3), pictures(splats, degree)) > 100


def test_what_others_read_from_splat_looks_almost_the_same(tmp_path: Path) -> None:
    splats = some_splats(500)
    save_splats(splats, tmp_path / "a.splat", "splat")
    found = splatset.load_file(tmp_path / "a.splat")
    columns = (
        found.positions,
        np.log(found.scales),
        found.rotations,
        np.log(np.maximum(found.opacity, 1e-6) / np.maximum(1 - found.opacity, 1e-6)),
        (found.rgb / 255 - 0.5) / SH_C0,
        np.zeros((500, 0, 3)),
    )
    again = Splats(*(torch.from_numpy(np.array(column)) for column in columns))
    clamped = splats._replace(colours=splats.colours.clamp(-0.5 / SH_C0, 0.5 / SH_C0))
    # Opacities, colours and rotations have eight bits.
    assert psnr(pictures(again), pictures(clamped)) > 55  # 61 dB


def test_splat_keeps_a_rotation_of_exactly_one(tmp_path: Path) -> None:
    splats = some_splats(1)._replace(rotations=torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
    save_splats(splats, tmp_path / "a.splat", "splat")
    assert (tmp_path / "a.splat").read_bytes()[28:] == bytes([255, 128, 128, 128])  # 256 is no byte


def test_gltf_by_hand_and_points_by_trimesh(tmp_path: Path) -> None:
    splats = some_splats(60, degree=2)
    save_splats(splats, tmp_path / "a.glb", "splats-glb")
    raw = (tmp_path / "a.glb").read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", raw)
    assert (magic, version, length, kind) == (b"glTF", 2, len(raw), b"JSON")
    tree = json.loads(raw[20 : 20 + size])
    assert tree["extensionsUsed"] == ["KHR_gaussian_splatting"]
    assert "extensionsRequired" not in tree  # without it, points are shown
    [primitive] = tree["meshes"][0]["primitives"]
    assert primitive["mode"] == 0
    assert primitive["extensions"]["KHR_gaussian_splatting"] == {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
    }

    def read(name: str) -> np.ndarray:
        accessor = tree["accessors"][primitive["attributes"].pop(name)]
        assert (accessor["componentType"], accessor["count"]) == (5126, 60)
        view = tree["bufferViews"][accessor["bufferView"]]
        start = 28 + size + view["byteOffset"]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        assert view["byteLength"] == 60 * 4 * width
        return np.frombuffer(raw, "<f4", 60 * width, start).reshape(60, width)

    own = "KHR_gaussian_splatting:"
    assert np.allclose(read("POSITION"), splats.means[:, [1, 2, 0]], atol=1e-6)
    linear = read("COLOR_0")
    quaternions = read(own + "ROTATION")
    assert np.allclose(np.linalg.norm(quaternions, axis=1), 1, atol=1e-6)
    turned = Rotation.from_quat(quaternions).as_matrix()  # x, y, z, w, as in glTF
    world = Rotation.from_quat(unit(splats.rotations), scalar_first=True).as_matrix()
    assert np.allclose(turned, world[:, [1, 2, 0]], atol=1e-6)
    assert np.allclose(read(own + "SCALE"), splats.log_scales.exp(), rtol=1e-6)
    opacity = read(own + "OPACITY")[:, 0]
    assert np.allclose(opacity, splats.opacity_logits.sigmoid(), atol=1e-6)
    constant = read(own + "SH_DEGREE_0_COEF_0")
    assert np.array_equal(constant, splats.colours)
    names = [f"{own}SH_DEGREE_{d}_COEF_{i}" for d in (1, 2) for i in range(2 * d + 1)]
    higher = np.stack([read(name) for name in names], axis=1)
    assert not primitive["attributes"]  # and nothing else
    # A direction in the file shows the colour of the same direction in the world.
    seen = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    colours = np.einsum("dk,nkc->dnc", harmonic_basis(seen, 2), splats.harmonics.double())
    same = np.einsum("dk,nkc->dnc", harmonic_basis(seen[:, [1, 2, 0]], 2), higher)
    assert np.allclose(same, colours, atol=1e-5)

    shown = np.clip(0.5 + SH_C0 * constant, 0, 1)
    light = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    assert np.allclose(linear, np.hstack([light, opacity[:, None]]), atol=1e-5)
    [points] = trimesh.load(tmp_path / "a.glb", process=False).geometry.values()
    assert isinstance(points, trimesh.PointCloud)
    assert np.allclose(points.vertices, splats.means[:, [1, 2, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("up", "axes"),
    [
        ("y", [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
        ("minus-y", [[0, -1, 0], [0, 0, -1], [1, 0, 0]]),
    ],
)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_up_turns_places_rotations_and_harmonics(
    up: str, axes: list[list[int]], degree: int, tmp_path: Path
) -> None:
    splats, turn = some_splats(40, degree=degree), np.array(axes, dtype=float)
    assert np.linalg.det(turn) == 1  # no mirror image
    save_splats(splats, tmp_path / "a.ply", "ply", up)
    rows = strict(tmp_path / "a.ply")
    assert np.allclose(rows[:, :3], splats.means.numpy() @ turn.T, atol=1e-6)
    turned = Rotation.from_quat(rows[:, 58:], scalar_first=True).as_matrix()
    world = Rotation.from_quat(unit(splats.rotations), scalar_first=True).as_matrix()
    assert np.allclose(turned, turn @ world, atol=1e-6)
    seen = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    there = torch.from_numpy(seen.numpy() @ turn.T)
    harmonics = rows[:, 9:54].reshape(40, 3, 15)
    same = np.einsum("dk,nck->dnc", harmonic_basis(there, 3), harmonics)
    given = splats.harmonics.double()
    colours = np.einsum("dk,nkc->dnc", harmonic_basis(seen, degree), given)
    assert np.allclose(same, colours, atol=1e-6)


@pytest.mark.parametrize("kind", ["ply", "splat", "splats-glb"])
def test_degenerate_gaussians_are_written_as_finite_numbers(kind: str, tmp_path: Path) -> None:
    splats = some_splats(6)
    splats.log_scales[0], splats.log_scales[1] = 1e4, -1e4
    splats.opacity_logits[2], splats.opacity_logits[3] = 1e4, -1e4
    splats.rotations[4], splats.rotations[5] = 0.0, 1e30
    save_splats(splats, tmp_path / "a", kind, "y")
    raw = (tmp_path / "a").read_bytes()
    if kind == "ply":
        rows = strict(tmp_path / "a")
        assert np.isfinite(rows).all()
        assert np.allclose(np.linalg.norm(rows[:, 58:], axis=1), 1)
    elif kind == "splat":
        found = splatset.decode(raw)
        assert np.isfinite(found.scales).all()
        assert np.allclose(np.linalg.norm(found.rotations, axis=1), 1)
        assert sorted(found.colors[:, 3])[0] == 0
        assert sorted(found.colors[:, 3])[-1] == 255
    else:
        size = struct.unpack_from("<I", raw, 12)[0]
        assert np.isfinite(np.frombuffer(raw[28 + size :], "<f4")).all()


@pytest.mark.parametrize("kind", ["ply", "splat", "splats-glb"])
def test_what_is_not_finite_is_refused_and_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_splats(some_splats(3), path, kind)
    before = path.read_bytes()
    for field in Splats._fields:
        splats = some_splats(5, degree=1)
        getattr(splats, field)[1] = math.nan
        with pytest.raises(ValueError, match=f"{field}: 1 of 5 Gaussians .* nan in row 1: their"):
            save_splats(splats, path, kind)
    with pytest.raises(ValueError, match="no Gaussians to write"):
        save_splats(some_splats(0), path, kind)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_formats_and_axes_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='spz': give one of ply, splat, splats-glb"):
        save_splats(some_splats(1), tmp_path / "a", "spz")  # type: ignore[arg-type]
    for up in ("z", "minus-y"):
        with pytest.raises(ValueError, match="glTF has y up"):
            save_splats(some_splats(1), tmp_path / "a", "splats-glb", up)
    assert not list(tmp_path.iterdir())
