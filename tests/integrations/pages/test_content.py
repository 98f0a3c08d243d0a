"""What pages hold: objects in few bits, pictures, facts."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from picardopt_3d.export.shown import ShownMesh, ShownSplats, shown
from picardopt_3d.pages.facts import headline, settings, stages
from picardopt_3d.pages.packed import packed
from picardopt_3d.pages.pictures import film_views, picture_in, picture_of
from picardopt_3d.scenes import Gaussians, GaussiansConfig, TexturedMesh
from picardopt_3d.scenes.gaussians.splats import rotation_matrices
from PIL import Image

from tests.integrations.helpers.analytic import Balls
from tests.integrations.helpers.splats import random_splats
from tests.integrations.meshes.test_textured import SMALL
from tests.integrations.pages.runs import FRAMES, REPORT, finished_run, scene_of_a_run


def unpacked(content: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of an object on a page, as its script reads them."""
    plain = zlib.decompress(base64.b64decode(content["packed"]))
    arrays = {}
    for each in content["arrays"]:
        kind = np.dtype(each["kind"]).newbyteorder("<")
        assert each["offset"] % 4 == 0
        arrays[each["name"]] = np.frombuffer(plain, kind, each["length"], each["offset"])
    return arrays


def placed(content: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    share = arrays["positions"].reshape(-1, 4)[:, :3] / 65535
    return np.asarray(content["low"]) + share * np.asarray(content["size"])


def gaussians(count: int = 40, degree: int = 0) -> Gaussians:
    splats = random_splats(count, scale=0.05, opacity=1.0, degree=degree, dtype=torch.float32)
    return Gaussians(GaussiansConfig(count=count, degree=degree), splats)


def test_a_field_is_shown_as_its_surface_with_no_more_triangles_than_asked_for() -> None:
    mesh = shown(Balls(), resolution=48, faces=500)
    assert isinstance(mesh, ShownMesh)
    assert len(mesh.faces) < 1000
    assert len(shown(Balls(), resolution=48).faces) > 2000  # type: ignore[union-attr]
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.4).max() < 0.02
    assert mesh.colours is not None
    assert np.abs(mesh.colours / 255 - (mesh.vertices + 0.5)).max() < 0.02
    assert (mesh.normals * mesh.vertices).sum(1).min() > 0.3
    assert mesh.said == f"{len(mesh.faces):,} triangles"


def test_a_texture_comes_along_and_vertices_are_split_where_it_is_cut() -> None:
    scene = TexturedMesh.from_scene(SMALL, Balls())
    mesh = shown(scene)
    assert isinstance(mesh, ShownMesh)
    assert mesh.coordinates is not None
    assert mesh.texture is not None
    assert len(mesh.vertices) == len(mesh.coordinates) > len(scene.vertices)
    corners = mesh.vertices[mesh.faces].reshape(-1, 3)
    size = len(mesh.texture)
    places = (mesh.coordinates[mesh.faces].reshape(-1, 2) * size).astype(int).clip(0, size - 1)
    painted = mesh.texture[places[:, 1], places[:, 0]] / 255
    assert np.abs(painted - (corners + 0.5)).mean() < 0.05


def test_gaussians_are_shown_as_they_are_the_most_important_first() -> None:
    scene = gaussians(degree=1)
    all_of_them, few = shown(scene), shown(scene, gaussians=10)
    assert isinstance(all_of_them, ShownSplats)
    assert isinstance(few, ShownSplats)
    assert (all_of_them.said, few.said) == ("40 Gaussians", "10 of 40 Gaussians")
    assert np.array_equal(few.means, all_of_them.means[:10])
    weight = all_of_them.opacities * all_of_them.scales.prod(1)
    assert (np.diff(weight) <= 1e-6 * weight[:-1]).all()
    own = scene.splats()
    found = [int((own.means - mean).norm(dim=1).argmin()) for mean in torch.tensor(few.means)]
    axes = rotation_matrices(own.rotations) * own.log_scales.exp()[:, None]
    wanted = (axes @ axes.mT).detach().numpy()[found]
    turned = rotation_matrices(torch.tensor(few.rotations)) * torch.tensor(few.scales)[:, None]
    assert np.allclose((turned @ turned.mT).numpy(), wanted, rtol=1e-4, atol=1e-7)


def test_packing_loses_little() -> None:
    mesh = shown(Balls(), resolution=32)
    assert isinstance(mesh, ShownMesh)
    content = packed(mesh, 64)
    arrays = unpacked(content)
    assert np.abs(placed(content, arrays) - mesh.vertices).max() < 1e-5
    assert np.array_equal(arrays["faces"].reshape(-1, 3), mesh.faces)
    assert np.array_equal(arrays["colours"].reshape(-1, 4)[:, :3], mesh.colours)
    assert np.abs(arrays["normals"].reshape(-1, 4)[:, :3] / 127 - mesh.normals).max() < 0.005

    splats = shown(gaussians())
    assert isinstance(splats, ShownSplats)
    content = packed(splats, 64)
    arrays = unpacked(content)
    assert (content["pixels"], content["blur"]) == (64, 0.3)
    assert np.abs(placed(content, arrays) - splats.means).max() < 1e-4
    low, high = content["scales"]
    logs = low + arrays["scales"].reshape(-1, 4)[:, :3] / 255 * (high - low)
    assert np.abs(logs - np.log(splats.scales)).max() < 0.01
    assert np.abs(arrays["rotations"].reshape(-1, 4) / 127 - splats.rotations).max() < 0.005
    rgba = arrays["colours"].reshape(-1, 4)
    assert np.array_equal(rgba[:, :3], splats.colours)
    assert np.abs(rgba[:, 3] / 255 - splats.opacities).max() < 0.003


def decoded(uri: str) -> NDArray[np.uint8]:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_the_films_views_are_in_order_in_two_sheets(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", scene_of_a_run())
    views = film_views(folder.film)
    assert views is not None
    assert (views.views, views.columns, views.pixels) == (FRAMES, 6, 48)
    sheet = decoded(views.colour)
    assert sheet.shape == (2 * 48, 6 * 48, 3)
    for index in range(FRAMES):
        top, left = index // 6 * 48, index % 6 * 48
        assert abs(int(sheet[top + 24, left + 24, 0]) - 20 * index) < 5
    assert decoded(views.normals)[..., 2].mean() > 230
    assert film_views(tmp_path / "none.mp4") is None
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"bad\.mp4 is no film"):
        film_views(tmp_path / "bad.mp4")


def test_large_pictures_become_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    assert picture_of(noise[:50]).startswith("data:image/png")
    assert picture_of(noise).startswith("data:image/jpeg")
    clear = np.zeros((600, 600, 4), np.uint8)
    clear[..., :3] = noise
    Image.fromarray(clear).save(tmp_path / "clear.png")
    shrunk = picture_in(tmp_path / "clear.png")
    assert shrunk is not None
    assert shrunk.startswith("data:image/jpeg")
    assert decoded(shrunk).min() > 240  # what is transparent is white
    assert picture_in(tmp_path / "none.png") is None


def test_facts_say_what_a_report_has_and_nothing_else() -> None:
    assert headline({}) == settings({}) == stages({}) == []
    assert [fact.value for fact in headline(REPORT)] == ["20.0 dB", "30", "10", "3.00", "8.0 s"]
    stopped = {fact.label: fact for fact in settings(REPORT | {"steps_done": 12})}
    assert stopped["Steps"] == ("Steps", "12", "of 30: it was stopped")
    alone = settings({"sequential": True, "sweeps": 5, "tolerance": None})
    assert alone == [("Sweeps", "5", "one step at a time")]
    parts = settings({"counts": {"Gaussians": [[0, 5], [9, 1200]]}, "gaussians": 1200})
    assert parts == [("Gaussians", "1,200", "")]
    row = {"name": "coarse", "steps_done": 1500, "sweeps": 300, "mean_stride": 5, "seconds": 9.96}
    assert stages({"stages": [row]}) == [["coarse", "1,500", "300", "5.00", "10.0", "-"]]
