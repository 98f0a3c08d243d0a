"""On CUDA: gsplat against plain torch, and plain torch against itself on the CPU."""

from __future__ import annotations

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.doctor.rasterizers import rasterizers
from picardopt_3d.scenes.gaussians.config import Rasterizer
from picardopt_3d.scenes.gaussians.gsplat_backend import why_not
from picardopt_3d.scenes.gaussians.rasterize import chosen, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats
from torch import Tensor

from tests.integrations.helpers.splats import leaves, random_splats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def gsplat() -> None:
    reason = why_not(CUDA)
    if reason is not None:
        pytest.skip(reason)


def rendered(
    splats: Splats, device: torch.device, rasterizer: Rasterizer, degree: int
) -> dict[str, Tensor]:
    """Pictures and gradients, on the CPU."""
    splats = leaves(Splats(*(tensor.to(device) for tensor in splats)))
    cameras = orbit_cameras(torch.tensor([-10.0, 30.0]), torch.tensor([0.0, 130.0]), 1.65)
    pictures = rasterize(splats, cameras.to(device), 48, 80, degree=degree, rasterizer=rasterizer)
    pictures.means2d.retain_grad()
    weights = torch.linspace(-1, 1, 80, device=device)
    loss = (pictures.colour * weights).sum() + pictures.opacity.square().sum()
    (loss + (pictures.depth * weights.flip(0)).sum()).backward()
    assert pictures.means2d.grad is not None
    found = {**pictures._asdict(), "gradient of means2d": pictures.means2d.grad}
    seen = (pictures.radii > 0)[..., None]
    for name in ("means2d", "gradient of means2d"):
        found[name] = torch.where(seen, found[name], 0)  # gsplat: of what is not seen, anything
    found.update({f"gradient of {name}": t.grad for name, t in splats._asdict().items()})
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding, and to single Gaussians that cover 1/255 of a pixel, a little more or less."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        difference = (found[name] - theirs).double()
        size = float(theirs.double().norm())
        assert float(difference.norm()) <= 2e-3 * size + 1e-6, name


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("opacity", [-2.0, 6.0])
@pytest.mark.usefixtures("gsplat")
def test_gsplat_draws_what_plain_torch_draws(degree: int, opacity: float) -> None:
    assert chosen("auto", CUDA) == "gsplat"
    splats = random_splats(1000, scale=0.03, degree=degree, opacity=opacity, dtype=torch.float32)
    expected = rendered(splats, torch.device("cpu"), "torch", degree)
    assert_alike(rendered(splats, CUDA, "gsplat", degree), expected)


def test_plain_torch_draws_the_same_on_cuda() -> None:
    splats = random_splats(1000, scale=0.03, degree=1, dtype=torch.float32)
    expected = rendered(splats, torch.device("cpu"), "torch", 1)
    assert_alike(rendered(splats, CUDA, "torch", 1), expected)


@pytest.mark.usefixtures("gsplat")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotations", 0.0),
        ("log_scales", 100.0),
        ("log_scales", -1e4),
        ("opacity_logits", 1e4),
        ("opacity_logits", -1e4),
        ("means", 1e30),
    ],
)
def test_gsplat_at_the_limits(field: str, value: float) -> None:
    splats = random_splats(5, dtype=torch.float32)
    getattr(splats, field)[0] = value
    for name, tensor in rendered(splats, CUDA, "gsplat", 0).items():
        assert tensor.isfinite().all(), name


@pytest.mark.usefixtures("gsplat")
def test_without_gaussians_gsplat_is_not_asked() -> None:
    assert not rendered(random_splats(0, dtype=torch.float32), CUDA, "gsplat", 0)["colour"].any()


@pytest.mark.usefixtures("gsplat")
def test_the_doctor_compares_both() -> None:
    assert [found.state for found in rasterizers()] == ["ok", "ok", "ok"]
