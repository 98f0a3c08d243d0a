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
_CENTRE, _SCALE, _LOGIT, _COLOUR = (0.1, -0.15, 0.2), 0.08, 1.0, (0.3, -0.4, 0.9)
"""The splat: a ball off the middle of the picture."""

_LARGEST = 1e-4
"""Largest difference of two pictures that is rounding."""


def rasterizers() -> list[Finding]:
    """Renders a known splat with every rasterizer that is installed, and returns how far its pictures are off.

    That of plain torch is compared with the formula, gsplat's with that of plain torch.
    """
    try:
        import torch

        expected = formula()
        found = [
            _compared("torch-rasterizer", "torch", torch.device("cpu"), expected, "its formula")
        ]
        return [*found, _gsplat()]
    except Exception as error:  # a package that is missing or does not import
        return [Finding("broken", "torch-rasterizer", f"does not run: {first_line(error)}")]


def _gsplat() -> Finding:
    """Whether gsplat draws what plain torch draws, or why it cannot be used."""
    import torch

    from picardopt_3d.scenes.gaussians.gsplat_backend import why_not

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not(device)
    if reason is not None:
        return Finding("absent", "gsplat-rasterizer", reason)
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
        torch.full((1, 3), math.log(_SCALE)),
        torch.tensor([[0.5, -0.5, 0.1, 0.7]]),
        torch.tensor([_LOGIT]),
        torch.tensor([_COLOUR]),
        torch.zeros(1, 0, 3),
    )
    splats = Splats(*(tensor.to(device) for tensor in splats))
    cameras = orbit_cameras(0.0, 0.0).to(device)
    drawn = rasterize(splats, cameras, _SIZE, _SIZE, degree=0, rasterizer=rasterizer)
    return torch.cat([drawn.colour, drawn.opacity, drawn.depth], dim=1)[0].cpu()


def formula() -> Tensor:
    """Returns the splat's picture in closed form, as `picture`: a ball's outline is that of a circular cone."""
    import torch

    from picardopt_3d.cameras import orbit_cameras

    cameras = orbit_cameras(
        0.0, 0.0
    )  # on the x axis: x is towards the camera, y to the right, z up
    depth = float(cameras.distance) - _CENTRE[0]
    focal = 0.5 * _SIZE / math.tan(math.radians(float(cameras.fov)) / 2)
    right, down = _CENTRE[1] / depth, -_CENTRE[2] / depth
    pixels = torch.arange(_SIZE, dtype=torch.float64) + 0.5 - 0.5 * _SIZE
    off_y, off_x = torch.meshgrid(pixels - focal * down, pixels - focal * right, indexing="ij")
    square = (focal * _SCALE / depth) ** 2
    xx, xy, yy = square * (1 + right**2), square * right * down, square * (1 + down**2)
    xx, yy = xx + 0.3, yy + 0.3  # the blur that every rasterizer adds
    power = (yy * off_x**2 - 2 * xy * off_x * off_y + xx * off_y**2) / (xx * yy - xy * xy)
    alpha = torch.exp(-0.5 * power) / (1 + math.exp(-_LOGIT))
    alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
    distance = math.dist(_CENTRE, cameras.position[0].tolist())
    values = [*(0.5 + 0.5 / math.sqrt(math.pi) * one for one in _COLOUR), 1.0, distance]
    return torch.stack([value * alpha for value in values]).float()
