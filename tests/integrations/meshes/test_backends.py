"""Which rasterizer of triangles is used where, and nvdiffrast's conventions as far as they can be tested on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.mesh import nvdiffrast_backend
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig
from picardopt_3d.scenes.mesh.nvdiffrast_backend import (
    clip_coordinates,
    rasterize_nvdiffrast,
    read,
    why_not,
)
from picardopt_3d.scenes.mesh.rasterize import check_usable, rasterize
from picardopt_3d.scenes.mesh.screen import NEAR, on_screen
from torch import Tensor

from tests.integrations.helpers.triangles import exact, random_triangles

CUDA = torch.device("cuda", 0)
CAMERAS = exact(orbit_cameras(torch.tensor([-10.0, 33.0]), torch.tensor([20.0, 170.0]), 1.65))


@pytest.fixture
def nvdiffrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file `nvdiffrast/torch.py` of a package that leads the import path; it is empty."""
    package = tmp_path / "nvdiffrast"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    caches = nvdiffrast_backend._trouble, nvdiffrast_backend._context
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_it(name)}
    for cached in caches:
        cached.cache_clear()
    yield package / "torch.py"
    for name in [name for name in sys.modules if _of_it(name)]:
        del sys.modules[name]
    sys.modules.update(before)
    for cached in caches:
        cached.cache_clear()


def _of_it(name: str) -> bool:
    return name.split(".")[0] == "nvdiffrast"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise RuntimeError('nvcc:\\nno such file')", "does not start: no such file"),
        ("import no_such_package", "does not import: No module named 'no_such_package'"),
        ("", "does not start: module 'nvdiffrast.torch' has no attribute"),
        (
            "def RasterizeCudaContext(device): raise RuntimeError(f'no driver for {device}')",
            "does not start: no driver for cuda:0",
        ),
    ],
)
def test_an_nvdiffrast_that_fails_is_not_passed_over(
    nvdiffrast: Path, content: str, said: str
) -> None:
    """Else one process could draw with torch and another with nvdiffrast: a drift that depends on the rank."""
    nvdiffrast.write_text(content)
    reason = why_not(CUDA)
    assert reason is not None
    assert said in reason
    with pytest.raises(ValueError, match='rasterizer="torch"') as refused:
        check_usable("nvdiffrast", CUDA)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    check_usable("torch", CUDA)


def test_its_context_is_made_once_for_each_device(nvdiffrast: Path) -> None:
    nvdiffrast.write_text("made = []\ndef RasterizeCudaContext(device): made.append(device)\n")
    for _ in range(3):
        for index in (0, 1):
            check_usable("nvdiffrast", torch.device("cuda", index))
    import nvdiffrast.torch  # type: ignore[import-not-found]

    assert nvdiffrast.torch.made == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("version", "good"), [("0.3.2.1", False), ("0.3.3", True), ("0.10", True)])
def test_old_versions_are_refused(nvdiffrast: Path, version: str, good: bool) -> None:
    """They draw only sizes that are multiples of 8."""
    nvdiffrast.write_text("def RasterizeCudaContext(device): return device\n")
    about = nvdiffrast.parent.with_name(f"nvdiffrast-{version}.dist-info")
    about.mkdir()
    about.joinpath("METADATA").write_text(f"Name: nvdiffrast\nVersion: {version}\n")
    if good:
        assert why_not(CUDA) is None
        return
    reason = why_not(CUDA)
    assert reason is not None
    assert f"nvdiffrast {version} is too old: it draws no other sizes than multiples of 8" in reason
    assert "pip install" in reason


@pytest.mark.usefixtures("nvdiffrast")
def test_on_a_cpu_it_is_refused_if_asked_for() -> None:
    rasterize(random_triangles(1), CAMERAS, 4, 4)
    with pytest.raises(ValueError, match="nvdiffrast needs CUDA, and this is cpu"):
        rasterize(random_triangles(1), CAMERAS, 4, 4, rasterizer="nvdiffrast")


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdiffrast_backend, "installed", lambda: False)
    check_usable("torch", CUDA)
    with pytest.raises(ValueError, match="not installed: pip install"):
        check_usable("nvdiffrast", CUDA)


@pytest.mark.parametrize("config", [TetrahedralConfig, TexturedMeshConfig])
def test_it_is_used_only_if_asked_for(config: type[TetrahedralConfig | TexturedMeshConfig]) -> None:
    """Its gradients do not repeat."""
    assert config().rasterizer == "torch"
    with pytest.raises(ValueError, match="rasterizer='auto': give one of torch, nvdiffrast"):
        config(rasterizer="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 9)])
def test_clip_coordinates_are_those_of_the_rays(height: int, width: int) -> None:
    """OpenGL's, with the rows counted from y = -w: the pixel that a ray goes through is the one it came from."""
    origins, directions = CAMERAS.rays(height, width)
    for view in range(len(CAMERAS)):
        one = CAMERAS[view : view + 1]
        depths = []
        for distance in (0.02, 0.7, 1.65, 30.0):
            points = (origins + distance * directions)[view].reshape(-1, 3)
            clip = clip_coordinates(on_screen(points, one, height), height, width)
            assert clip.dtype == torch.float32
            assert clip.is_contiguous()
            x, y, z, w = clip[0].unbind(-1)
            column = (x / w + 1) / 2 * width - 0.5
            row = (y / w + 1) / 2 * height - 0.5
            number = torch.arange(height * width)
            torch.testing.assert_close(column, (number % width).float(), atol=1e-4, rtol=0)
            torch.testing.assert_close(row, (number // width).float(), atol=1e-4, rtol=0)
            assert ((z / w).abs() <= 1).all()
            depths.append(z / w)
        assert (torch.stack(depths).diff(dim=0) > 0).all()  # the nearer, the smaller
    ahead = CAMERAS.position - NEAR * CAMERAS.camera_to_world[:, :3, 2]
    near = clip_coordinates(on_screen(ahead, CAMERAS, height), height, width)
    torch.testing.assert_close(near.diagonal()[2] / near.diagonal()[3], -torch.ones(2))


def _rasterize(
    context: str, pos: Tensor, tri: Tensor, resolution: tuple[int, int], grad_db: bool
) -> tuple[Tensor, None]:
    """What nvdiffrast documents of its function of this name, by a loop over faces."""
    assert context == "context"
    assert not grad_db
    assert pos.dtype == torch.float32
    assert tri.dtype == torch.int32
    assert pos.is_contiguous()
    assert tri.is_contiguous()
    height, width = resolution
    y, x = torch.meshgrid(
        *((2 * torch.arange(size) + 1) / size - 1 for size in resolution), indexing="ij"
    )
    rast = torch.zeros(len(pos), height, width, 4)
    nearest = torch.full((len(pos), height, width), torch.inf)
    for number, face in enumerate(tri.long()):
        a, b, c = (
            torch.stack(
                [
                    p[:, None, None, 0] - x * p[:, None, None, 3],
                    p[:, None, None, 1] - y * p[:, None, None, 3],
                ]
            )
            for p in pos[:, face].unbind(1)
        )
        areas = torch.stack([p[0] * q[1] - p[1] * q[0] for p, q in ((b, c), (c, a), (a, b))], -1)
        shares = areas / areas.sum(-1, keepdim=True)
        ends = pos[:, None, None, face]
        depth = (shares * ends[..., 2]).sum(-1) / (shares * ends[..., 3]).sum(-1)
        hit = (shares >= 0).all(-1) & (depth.abs() <= 1) & (depth < nearest)
        nearest = torch.where(hit, depth, nearest)
        row = torch.stack(
            [*shares[..., :2].unbind(-1), depth, torch.full_like(depth, number + 1)], -1
        )
        rast = torch.where(hit[..., None], row, rast)
    return rast, None


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 21)])
def test_what_it_documents_is_what_plain_torch_draws(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    """Faces, weights and gradients, through the conversions both ways."""
    package, module = ModuleType("nvdiffrast"), ModuleType("nvdiffrast.torch")
    package.torch, module.rasterize = module, _rasterize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvdiffrast", package)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", module)
    monkeypatch.setattr(nvdiffrast_backend, "_context", lambda index: "context")
    monkeypatch.setattr(nvdiffrast_backend, "_index", lambda device: 0)
    triangles = random_triangles(12, dtype=torch.float32)
    triangles.vertices.requires_grad_()
    cameras = CAMERAS.to(torch.float32)
    weights = torch.randn(2, height, width, 3)
    drawn = rasterize(triangles, cameras, height, width)
    (expected,) = torch.autograd.grad((drawn.barycentric * weights).sum(), triangles.vertices)
    screen = on_screen(triangles.vertices, cameras, height)
    face, shares, kept = rasterize_nvdiffrast(screen, triangles.faces, height, width)
    assert torch.equal(face, drawn.face)
    assert (face >= 0).float().mean() > 0.2
    torch.testing.assert_close(shares, drawn.barycentric, atol=1e-4, rtol=1e-4)
    (found,) = torch.autograd.grad((shares * weights).sum(), triangles.vertices)
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert kept.faces.dtype == torch.int32


def test_numbers_of_faces_beyond_those_that_a_float_counts() -> None:
    """Up to 2^24 the float is the number, from there on its bits are, above 0x4A800000."""
    faces = torch.tensor([-1, 0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 12345], dtype=torch.int64)
    bits = (faces + 1 + 0x4A800000).int().view(torch.float32)
    number = torch.where(faces + 1 <= 2**24, (faces + 1).float(), bits)
    rast = torch.stack([torch.full((7,), x) for x in (0.2, 0.3, 0.0)] + [number], dim=-1)
    found, shares = read(rast.view(1, 1, 7, 4))
    assert torch.equal(found.view(-1), faces)
    assert not shares[0, 0, 0].any()
    torch.testing.assert_close(shares[0, 0, 1:], torch.tensor([0.2, 0.3, 0.5]).expand(6, 3))
