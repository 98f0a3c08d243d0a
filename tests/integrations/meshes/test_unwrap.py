"""Texture coordinates: where triangles lie, room between charts, the same in every process, Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.scenes.mesh import texels as texels_module
from picardopt_3d.scenes.mesh.lookup import sampled
from picardopt_3d.scenes.mesh.texels import spread, texels_of
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import MOST_FACES, Unwrapped, unwrap

from picardopt import launch
from tests.integrations.helpers.textures import ball, bumpy, charts

SIZE = 128


@pytest.fixture(scope="module")
def mesh() -> Triangles:
    return bumpy(12)


@pytest.fixture(scope="module")
def flat(mesh: Triangles) -> Unwrapped:
    return unwrap(mesh, SIZE)


def test_every_triangle_has_a_place_of_its_own(mesh: Triangles, flat: Unwrapped) -> None:
    assert flat.faces.shape == mesh.faces.shape
    assert bool(((flat.coordinates >= 0) & (flat.coordinates <= 1)).all())
    # Corners that share texture coordinates are the same vertex: the triangles are in the mesh's order.
    vertex = torch.full((len(flat.coordinates),), -1)
    vertex[flat.faces] = mesh.faces
    assert torch.equal(vertex[flat.faces], mesh.faces)
    a, b, c = (SIZE * flat.coordinates[flat.faces]).unbind(1)
    areas = 0.5 * torch.linalg.cross(
        *(torch.nn.functional.pad(side, (0, 1)) for side in (b - a, c - a))
    ).norm(dim=1)
    covered = len(texels_of(flat, SIZE).place)
    # Were triangles on top of each other, fewer texels would be covered than their areas' sum.
    assert covered == pytest.approx(float(areas.sum()), rel=0.03)
    assert covered > 0.3 * SIZE**2
    # As large on the texture as on the mesh, all by one factor.
    sides = mesh.vertices[mesh.faces]
    true = torch.linalg.cross(sides[:, 1] - sides[:, 0], sides[:, 2] - sides[:, 0]).norm(dim=1)
    ratio = areas / true
    assert float(ratio.quantile(0.95) / ratio.quantile(0.05)) < 2


def test_a_texel_is_where_its_triangle_is(
    mesh: Triangles, flat: Unwrapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    texels = texels_of(flat, SIZE)
    assert len(texels.place.unique()) == len(texels.place)
    assert float(texels.barycentric.min()) > -1e-4
    corners = flat.coordinates[flat.faces[texels.face]]
    at = (texels.barycentric[:, :, None] * corners).sum(1) * SIZE
    expected = torch.stack([texels.place % SIZE, texels.place // SIZE], dim=1) + 0.5
    assert torch.allclose(at, expected.float(), atol=1e-3)
    off = texels.points(mesh).norm(dim=1) - 0.4
    assert float(off.abs().max()) < 0.05
    # In parts, as large meshes are done.
    monkeypatch.setattr(texels_module, "_PAIRS", 500)
    again = texels_of(flat, SIZE)
    assert all(torch.equal(one, other) for one, other in zip(texels, again, strict=True))


@pytest.mark.parametrize("size", [64, 128])
def test_no_chart_shows_the_colour_of_another(mesh: Triangles, size: int) -> None:
    flat = unwrap(mesh, size)
    chart = charts(flat.faces)
    assert len(chart.unique()) > 2
    colours = torch.rand(int(chart.max()) + 1, 3, generator=torch.Generator().manual_seed(0))
    colours = 0.1 + 0.8 * colours
    texels = texels_of(flat, size)
    texture = spread(colours[chart[texels.face]], texels.place, size)
    face = torch.arange(len(flat.faces)).repeat(40)
    shares = torch.rand(len(face), 3, generator=torch.Generator().manual_seed(1)) ** 3 + 1e-9
    shares[: len(flat.faces)] = torch.tensor([1.0, 0.0, 0.0])  # corners and edges too
    shares[len(flat.faces) : 2 * len(flat.faces)] = torch.tensor([0.0, 0.3, 0.7])
    shares = shares / shares.sum(1, keepdim=True)
    places = (shares[:, :, None] * flat.coordinates[flat.faces[face]]).sum(1)
    found = sampled(texture.logit(), places)
    assert torch.allclose(found, colours[chart[face]], atol=1e-4)


def test_the_nearest_texel_fills_the_rest() -> None:
    values = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    whole = spread(values, torch.tensor([0, 15]), 4)
    assert torch.equal(whole[0, 0], values[0])
    assert torch.equal(whole[3, 3], values[1])
    assert torch.equal(whole[0, 1], values[0])
    assert torch.equal(whole[3, 2], values[1])


def test_progress_adds_up_and_what_cannot_be_unwrapped_is_refused(mesh: Triangles) -> None:
    told: list[int] = []
    unwrap(bumpy(60), 64, progress=told.append)
    assert sum(told) == 4 * 60**2
    assert told[0] == 0  # a sign of life while the library works
    with pytest.raises(ValueError, match="without triangles"):
        unwrap(Triangles(mesh.vertices, mesh.faces[:0]), 64)
    many = mesh.faces[:1].expand(MOST_FACES + 1, 3)
    with pytest.raises(ValueError, match="too many to unwrap: simplify"):
        unwrap(Triangles(mesh.vertices, many), 64)


def test_a_mesh_of_any_size_is_unwrapped_alike(mesh: Triangles, flat: Unwrapped) -> None:
    """xatlas leaves out triangles that are small in its units."""
    for factor in (2.0**-10, 2.0**10):  # no vertex is rounded
        other = unwrap(Triangles(factor * mesh.vertices, mesh.faces), SIZE)
        assert torch.equal(other.coordinates, flat.coordinates)
        assert torch.equal(other.faces, flat.faces)
    other = unwrap(Triangles(1e-3 * mesh.vertices, mesh.faces), SIZE)
    covered, expected = (texels_of(each, SIZE).face for each in (other, flat))
    assert len(covered) > 0.85 * len(expected)
    assert len(covered.unique()) > 0.95 * len(mesh.faces)


def test_a_mesh_that_has_no_place_on_a_texture_is_refused(mesh: Triangles) -> None:
    with pytest.raises(ValueError, match="cannot be unwrapped"):
        unwrap(Triangles(0 * mesh.vertices, mesh.faces), SIZE)
    broken = mesh.vertices.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        unwrap(Triangles(broken, mesh.faces), SIZE)


def digest() -> str:
    flat = unwrap(bumpy(12), SIZE)
    return hashlib.sha1(
        flat.coordinates.numpy().tobytes() + flat.faces.numpy().tobytes()
    ).hexdigest()


def put(queue: Any) -> None:
    queue.put(digest())


def test_every_process_finds_the_same_even_a_daemonic_one() -> None:
    here = digest()
    assert launch(digest, workers=2) == [here, here]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=120) == here
    process.join()


SCRIPT = """
from tests.integrations.helpers.textures import bumpy
from picardopt_3d.scenes.mesh.unwrap import unwrap
mesh = bumpy({rows})
print("begun", flush=True)
unwrap(mesh, 256)
print("ended", flush=True)
"""


def children(of: int) -> list[int]:
    """Processes that a process started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == of and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def has_loaded(process: int, library: str) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        return library in (Path("/proc") / str(process) / "maps").read_text()
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "ending", ["Ctrl-C", pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM", "SIGKILL"]
)
def test_nothing_is_left_of_an_unwrapping_that_is_ended(ending: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(rows=220)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begun\n"
        deadline = time.monotonic() + 100
        while not ((own := children(process.pid)) and has_loaded(own[0], "xatlas")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # xatlas runs, and nothing else
        assert children(process.pid) == own
        if ending == "Ctrl-C":  # as a terminal sends it: to all
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(getattr(signal, ending))
        output, said = process.communicate(timeout=60)
        assert "ended" not in output
        assert process.returncode != 0
        assert ("KeyboardInterrupt" in said) == (ending in ("Ctrl-C", "SIGINT"))
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{each}").exists() for each in own):
            assert time.monotonic() < deadline, "xatlas still runs"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def test_a_ball_needs_few_charts() -> None:
    flat = unwrap(ball(faces=500), SIZE)
    assert len(charts(flat.faces).unique()) < 30
