"""On CUDA: plain torch against itself on the CPU, and nvdiffrast against plain torch."""

from __future__ import annotations

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.doctor.mesh_rasterizers import mesh_rasterizers
from picardopt_3d.scenes.mesh.config import Rasterizer
from picardopt_3d.scenes.mesh.nvdiffrast_backend import why_not
from picardopt_3d.scenes.mesh.rasterize import antialias, interpolate, rasterize
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

from tests.integrations.helpers.triangles import random_triangles, sphere

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def nvdiffrast() -> None:
    reason = why_not(CUDA)
    if reason is not None:
        pytest.skip(reason)


def drawn(triangles: Triangles, device: torch.device, rasterizer: Rasterizer) -> dict[str, Tensor]:
    """Faces, an antialiased picture and gradients, on the CPU."""
    vertices = triangles.vertices.detach().to(device).requires_grad_()
    triangles = Triangles(vertices, triangles.faces.to(device))
    cameras = orbit_cameras(torch.tensor([-10.0, 30.0]), torch.tensor([0.0, 130.0])).to(device)
    found = rasterize(triangles, cameras, 48, 80, rasterizer=rasterizer)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(len(vertices), 6, generator=generator).to(device).requires_grad_()
    image = interpolate(found, triangles.faces, values)
    image = antialias(image, found, triangles, cameras)
    image.square().sum().backward()
    assert vertices.grad is not None
    assert values.grad is not None
    parts = {"face": found.face, "weights": found.barycentric, "picture": image}
    parts |= {"gradient of vertices": vertices.grad, "gradient of values": values.grad}
    return {name: part.detach().cpu() for name, part in parts.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    """But for a share of the pixels, whose centres lie on an edge to rounding."""
    same = found["face"] == expected["face"]
    assert float((~same).float().mean()) <= most
    torch.testing.assert_close(
        found["weights"][same], expected["weights"][same], rtol=1e-2, atol=1e-3
    )
    for name in ("picture", "gradient of vertices", "gradient of values"):
        difference = float((found[name] - expected[name]).norm())
        assert difference <= (10 * most + 1e-3) * float(expected[name].norm()), name


@pytest.mark.parametrize("shape", ["sphere", "loose"])
def test_plain_torch_draws_the_same_on_cuda(shape: str) -> None:
    triangles = sphere(3) if shape == "sphere" else random_triangles(50)
    triangles = Triangles(triangles.vertices.float(), triangles.faces)
    expected = drawn(triangles, torch.device("cpu"), "torch")
    assert_alike(drawn(triangles, CUDA, "torch"), expected, 0.001)


def test_plain_torch_repeats_every_bit_on_cuda() -> None:
    """Gradients too: none of its sums has an order of chance."""
    triangles = sphere(3, dtype=torch.float32)
    kept = drawn(triangles, CUDA, "torch")
    for _ in range(5):
        for name, part in drawn(triangles, CUDA, "torch").items():
            assert torch.equal(part, kept[name]), name


@pytest.mark.usefixtures("nvdiffrast")
@pytest.mark.parametrize("shape", ["sphere", "loose"])
def test_nvdiffrast_draws_what_plain_torch_draws(shape: str) -> None:
    """It rounds vertices to sixteenths of a pixel where it decides what is covered.

    The faces are large: at an outline of smaller ones than a pixel it sees fewer silhouettes than plain torch does.
    """
    triangles = sphere(0) if shape == "sphere" else random_triangles(50)
    triangles = Triangles(triangles.vertices.float(), triangles.faces)
    expected = drawn(triangles, torch.device("cpu"), "torch")
    assert_alike(drawn(triangles, CUDA, "nvdiffrast"), expected, 0.02)


@pytest.mark.usefixtures("nvdiffrast")
def test_without_faces_nvdiffrast_is_not_asked() -> None:
    empty = Triangles(torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert not drawn(empty, CUDA, "nvdiffrast")["picture"].any()


def test_the_doctor_draws_on_every_device() -> None:
    found = {one.name: one.state for one in mesh_rasterizers()}
    assert found["torch-triangles"] == found["torch-triangles-cuda"] == "ok"
    assert found["nvdiffrast-triangles"] in ("ok", "absent")
