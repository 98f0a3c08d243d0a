"""Whether the rasterizers of 3D Gaussians draw what they should."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from picardopt_3d.doctor.finding import Finding, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from picardopt_3d.scenes.gaussians.config import Rasterizer

_SIZE = 32
_CENTRE, _SCALES, _LOGIT, _COLOUR = (0.1, -0.15, 0.2), (0.05, 0.16, 0.09), 1.0, (0.3, -0.4, 0.9)
_ROTATION = (1.0, -0.9, 0.3, 1.4)
"""The splat: off the middle of the picture, of three different axes, turned by a quaternion w, x, y, z."""

_LARGEST = 1e-4
"""Largest difference of two pictures that is rounding."""


def rasterizers() -> list[Finding]:
    """Renders a known splat with every rasterizer that is installed, and returns how far its pictures are off.

    That of plain torch, on the CPU and on CUDA, is compared with the formula, gsplat's with that of plain torch.
    """
    try:
        import torch

        expected = formula()
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        devices = [torch.device(kind) for kind in kinds]
        found = [_torch(device, expected) for device in devices]
        return [*found, _gsplat(devices[-1])]
    except Exception as error:  # a package that is missing or does not import
        return [Finding("broken", "torch-rasterizer", f"does not run: {first_line(error)}")]


def _torch(device: torch.device, expected: Tensor) -> Finding:
    """Whether plain torch draws what the formula says."""
    name = "torch-rasterizer" if device.type == "cpu" else f"torch-rasterizer-{device.type}"
    try:
        return _compared(name, "torch", device, expected, "its formula")
    except Exception as error:  # whatever a driver says
        return Finding("broken", name, f"does not run: {first_line(error)}")


def _gsplat(device: torch.device) -> Finding:
    """Whether gsplat draws what plain torch draws, or why it cannot be used."""
    import torch

    from picardopt_3d.scenes.gaussians.gsplat_backend import installed, why_not

    reason = why_not(device)
    if reason is not None:
        should = installed() and device.type == "cuda"
        return Finding("broken" if should else "absent", "gsplat-rasterizer", reason)
    try:
        expected = picture("torch", torch.device("cpu"))
        return _compared("gsplat-rasterizer", "gsplat", device, expected, "that of plain torch")
    except Exception as error:  # whatever a driver says
        return Finding("broken", "gsplat-rasterizer", f"does not run: {first_line(error)}")


def _compared(
    name: str, rasterizer: Rasterizer, device: torch.device, expected: Tensor, what: str
) -> Finding:
    """Whether the picture of one rasterizer is the expected one."""
    difference = float((picture(rasterizer, device) - expected).abs().max())
    if not difference <= _LARGEST:
        wrong = f"draws a wrong picture: a splat differs from {what} by {difference:.1g}"
        return Finding("broken", name, wrong)
    return Finding("ok", name, f"on {device.type}: a splat differs from {what} by {difference:.0e}")


def picture(rasterizer: Rasterizer, device: torch.device) -> Tensor:
    """Returns the splat's picture on the CPU: colour, opacity and depth, `[5, size, size]`."""
    import torch

    from picardopt_3d.cameras import orbit_cameras
    from picardopt_3d.scenes.gaussians.rasterize import rasterize
    from picardopt_3d.scenes.gaussians.splats import Splats

    splats = Splats(
        torch.tensor([_CENTRE]),
        torch.tensor([_SCALES]).log(),
        torch.tensor([_ROTATION]),
        torch.tensor([_LOGIT]),
        torch.tensor([_COLOUR]),
        torch.zeros(1, 0, 3),
    )
    splats = Splats(*(tensor.to(device) for tensor in splats))
    cameras = orbit_cameras(0.0, 0.0).to(device)
    drawn = rasterize(splats, cameras, _SIZE, _SIZE, degree=0, rasterizer=rasterizer)
    return torch.cat([drawn.colour, drawn.opacity, drawn.depth], dim=1)[0].cpu()


def formula() -> Tensor:
    """Returns the splat's picture in closed form, as `picture` does."""
    import torch
    from scipy.spatial.transform import Rotation

    from picardopt_3d.cameras import orbit_cameras

    # The camera is on the x axis: x is towards it, y to the right, z up.
    cameras = orbit_cameras(0.0, 0.0)
    depth = float(cameras.distance) - _CENTRE[0]
    focal = 0.5 * _SIZE / math.tan(math.radians(float(cameras.fov)) / 2)
    right, down = _CENTRE[1] / depth, -_CENTRE[2] / depth
    pixels = torch.arange(_SIZE, dtype=torch.float64) + 0.5 - 0.5 * _SIZE
    off_y, off_x = torch.meshgrid(pixels - focal * down, pixels - focal * right, indexing="ij")
    # How the centre moves on the screen, for each unit along the axes of the world and then along the splat's own.
    w, x, y, z = _ROTATION
    turn = torch.from_numpy(Rotation.from_quat([x, y, z, w]).as_matrix())
    slopes = torch.tensor([[right, 1.0, 0.0], [down, 0.0, -1.0]], dtype=torch.float64)
    spread = focal / depth * slopes @ turn * torch.tensor(_SCALES)
    (xx, xy), (_, yy) = (spread @ spread.mT).tolist()
    xx, yy = xx + 0.3, yy + 0.3  # the blur that every rasterizer adds
    power = (yy * off_x**2 - 2 * xy * off_x * off_y + xx * off_y**2) / (xx * yy - xy * xy)
    alpha = torch.exp(-0.5 * power) / (1 + math.exp(-_LOGIT))
    alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
    distance = math.dist(_CENTRE, cameras.position[0].tolist())
    values = [*(0.5 + 0.5 / math.sqrt(math.pi) * one for one in _COLOUR), 1.0, distance]
    return torch.stack([value * alpha for value in values]).float()
