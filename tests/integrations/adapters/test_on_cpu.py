"""What stands for CUDA in the trials of other people's code."""

import math
from types import SimpleNamespace

import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.gaussians.projection import world_to_camera
from picardopt_3d.scenes.gaussians.rasterize import rasterize
from picardopt_3d.scenes.gaussians.splats import Splats

from tests.integrations.adapters.folder import ADAPTERS, load

CPU = torch.device("cpu")


def test_cuda_devices_are_the_cpu_inside_the_block() -> None:
    module = load("cuda_on_cpu", ADAPTERS / "on_cpu" / "cuda_on_cpu.py")
    with module.cuda_on_cpu():
        made = [
            torch.zeros(2, device="cuda"),
            torch.ones(1, device=0),
            torch.ones(1).to("cuda:1"),
            torch.ones(1).to(device=torch.device("cuda")),
            torch.ones(1).cuda(),
        ]
        module_on_cuda = torch.nn.Linear(1, 1).to(torch.device("cuda:0"))
        event = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
    assert all(value.device == CPU for value in [*made, *module_on_cuda.parameters()])
    assert event.elapsed_time(event) == 0


def test_every_bit_is_compared() -> None:
    module = load("compare", ADAPTERS / "on_cpu" / "compare.py")
    first = {"a": [torch.zeros(2), torch.ones(0, 3)], "b": 1.0}
    second = {"a": [torch.tensor([0.0, -0.0]), torch.ones(0, 3)], "b": 1.0}
    assert module.differences(first, first) == []
    assert module.differences(first, second) == [".a.0"]
    assert module.differences(first, {"a": first["a"]}) == [": other keys"]
    assert module.differences(first["a"], [torch.zeros(2)]) == [": other length"]
    assert module.differences({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)}) == [".a"]


def test_the_rasterizer_draws_what_that_of_picardopt_3d_draws() -> None:
    """Also the gradient of the centres on the screen, per half an edge."""
    module = load(
        "diff_gaussian_rasterization",
        ADAPTERS / "dreamgaussian" / "on_cpu" / "diff_gaussian_rasterization.py",
    )
    draw = torch.Generator().manual_seed(0)
    count, height, width = 12, 20, 20
    splats = Splats(
        0.3 * torch.randn(count, 3, generator=draw),
        torch.randn(count, 3, generator=draw) - 2.5,
        torch.randn(count, 4, generator=draw),
        torch.randn(count, generator=draw),
        torch.randn(count, 3, generator=draw),
        torch.randn(count, 3, 3, generator=draw),
    )
    cameras = orbit_cameras(20.0, 70.0)
    expected = rasterize(
        splats._replace(means=splats.means.requires_grad_()),
        cameras, height, width, degree=1, rasterizer="torch",
    )  # fmt: skip
    background = torch.tensor([0.2, 0.5, 0.9])
    weights = torch.randn(3, height, width, generator=draw)
    expected.means2d.retain_grad()
    picture = expected.colour[0] + (1 - expected.opacity[0]) * background[:, None, None]
    (picture * weights).sum().backward()

    tangent = math.tan(math.radians(float(cameras.fov)) / 2)
    view = SimpleNamespace(
        image_height=height, image_width=width, tanfovx=tangent, tanfovy=tangent, bg=background,
        scale_modifier=1.0, viewmatrix=world_to_camera(cameras)[0].mT, sh_degree=1,
    )  # fmt: skip
    screen = torch.zeros(count, 3, requires_grad=True)
    drawn, radii, _, opacity = module.GaussianRasterizer(view)(
        means3D=splats.means.detach(),
        means2D=screen,
        opacities=splats.opacity_logits.sigmoid()[:, None],
        shs=torch.cat([splats.colours[:, None], splats.harmonics], dim=1),
        scales=splats.log_scales.exp(),
        rotations=splats.rotations,
    )
    (drawn * weights).sum().backward()
    torch.testing.assert_close(drawn, picture.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(opacity, expected.opacity[0].detach(), rtol=1e-4, atol=1e-4)
    assert radii.tolist() == expected.radii[0].int().tolist()
    assert expected.means2d.grad is not None
    assert screen.grad is not None
    edges = expected.means2d.grad[0] * torch.tensor([width / 2, height / 2])
    torch.testing.assert_close(screen.grad[:, :2], edges, rtol=1e-3, atol=1e-3)
    assert edges.abs().max() > 1
