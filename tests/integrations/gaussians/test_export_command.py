"""`picardopt export` of a run whose scene is Gaussians."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from picardopt_3d.export.command import main
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import TexturedMesh, save_scene
from picardopt_3d.scenes.gaussians import Gaussians, GaussiansConfig
from plyfile import PlyData

from tests.integrations.helpers.splats import random_splats
from tests.integrations.meshes.test_textured import SMALL, quadrants, square


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 300 Gaussians of degree 1."""
    folder = tmp_path_factory.mktemp("runs") / "gaussians"
    folder.mkdir()
    splats = random_splats(300, scale=0.1, opacity=1.0, degree=1, dtype=torch.float32)
    scene = Gaussians(GaussiansConfig(count=300, degree=1), splats)
    save_scene(scene, folder / "scene.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (
            "ply",
            "splats.ply",
            "300 Gaussians, z up as in the scene (most viewers expect --up minus-y)",
        ),
        (
            "splat",
            "splats.splat",
            "300 Gaussians, without the part of their colours that depends on",
        ),
        ("splats-glb", "splats.glb", "300 Gaussians\n"),
    ],
)
def test_gaussians_are_written_as_they_are(
    run: Path, kind: str, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--format", kind])
    assert (run / name).stat().st_size > 300 * 31
    told = capsys.readouterr()
    assert told.out.startswith(f"{run / name}: {said}")
    assert told.out.count("\n") == 1
    assert "surface" not in told.err


def test_the_suffix_names_the_format_and_up_is_as_asked_for(run: Path, tmp_path: Path) -> None:
    main([str(run), "--out", str(tmp_path / "z.ply")])
    main([str(run / "scene.safetensors"), "--out", str(tmp_path / "a.ply"), "--up", "minus-y"])
    z, turned = (PlyData.read(tmp_path / name)["vertex"] for name in ("z.ply", "a.ply"))
    assert np.allclose(turned["y"], -z["z"], atol=1e-6)
    assert np.allclose(turned["z"], z["x"], atol=1e-6)


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_a_mesh_is_that_of_their_density_and_the_line_says_so(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--format", kind, "--resolution", "32", "--components", "1"])
    shape = trimesh.load(run / f"mesh.{kind}", force="mesh", process=False)
    assert shape.is_watertight
    told = capsys.readouterr().out
    assert re.fullmatch(
        rf".*mesh\.{kind}: {len(shape.vertices)} vertices, {len(shape.faces)} triangles, cut out of the density of "
        r"300 Gaussians on a grid of 32 cubed\n",
        told,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "ply", "--resolution", "64"], "--resolution: of no use for format ply"),
        (["--out", "a.splat", "--faces", "9", "--level", "1"], "--level, --faces: of no use for"),
        (["--format", "splats-glb", "--components", "1"], "--components: of no use for format spl"),
        (["--format", "ply", "--out", "."], "is a folder: give the file to write"),
        (["--format", "glb", "--level", "99", "--resolution", "16"], "Give a lower level"),
    ],
)
def test_what_does_not_fit_gets_one_line(
    run: Path,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(run), *arguments])
    assert caught.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("picardopt export: ")
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["ply", "glb"])
def test_gaussians_that_diverged_are_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splats = random_splats(30, dtype=torch.float32)
    splats.means[4] = torch.nan
    scene = Gaussians(GaussiansConfig(count=30), splats)
    save_scene(scene, tmp_path / "scene.safetensors")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "scene.safetensors"), "--format", kind])
    assert "means: 1 of 30 Gaussians hold values that are not finite" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_gaussians_of_an_earlier_stage_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DreamGaussian ends with a mesh: its Gaussians lie in the first stage's folder."""
    earlier, last = (RunFolder(tmp_path).stage(i, n) for i, n in enumerate(("gaussians", "mesh")))
    for stage in (earlier, last):
        stage.path.mkdir(parents=True)
        stage.checkpoint.touch()
    earlier.scene.write_bytes((run / "scene.safetensors").read_bytes())
    save_scene(TexturedMesh(SMALL, *square(), quadrants(SMALL.texture)), last.scene)
    for kind in ("splat", "splats-glb"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--format", kind])
        said = capsys.readouterr().err
        assert "is a TexturedMesh, which holds no Gaussians; give glb, obj, ply" in said
        assert f"for the run's Gaussians export {earlier.scene}" in said
    main([str(tmp_path), "--format", "ply"])
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'mesh.ply'}: 4 vertices")
    assert said.err.count("note: ") == 1
    assert f"for its Gaussians export {earlier.scene}" in said.err
    main([str(tmp_path), "--format", "glb"])
    assert "note" not in capsys.readouterr().err
    main([str(earlier.scene), "--format", "ply"])
    assert "300 Gaussians" in capsys.readouterr().out
