"""Whether the rasterizers of triangles draw what they should."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from picardopt_3d.doctor.finding import Finding, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from picardopt_3d.scenes.mesh.config import Rasterizer

_SIZE = 32
_OFFSET, _SLOPE = 12.625, 0.25
"""The edge that is seen: its columns at the upper border and by how much they grow a row; it passes no pixel's centre
nearer than an eighth, so that a rasterizer may round."""
_CORNERS = ((-40.0, 1.2), (72.0, 2.1)), (-150.0, 16.0, 1.5)
"""The triangle: rows and depths of its corners on that edge; column, row and depth of the third, far to the left."""
_LARGEST = {"torch": 1e-4, "nvdiffrast": 1e-3}
"""Largest difference of two pictures that is rounding."""


def mesh_rasterizers() -> list[Finding]:
    """Draws a known triangle with every rasterizer that is installed, and returns how far its pictures are off.

    All are compared with the formula: positions inside, and how the silhouette cuts pixels.
    """
    try:
        import torch

        expected = formula()
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        devices = [torch.device(kind) for kind in kinds]
        found = [_compared("torch", device, expected) for device in devices]
        return [*found, _nvdiffrast(devices[-1], expected)]
    except Exception as error:  # a package that is missing or does not import
        return [Finding("broken", "torch-triangles", f"does not run: {first_line(error)}")]


def _nvdiffrast(device: torch.device, expected: Tensor) -> Finding:
    """Whether nvdiffrast draws what the formula says, or why it cannot be used."""
    from picardopt_3d.scenes.mesh.nvdiffrast_backend import installed, why_not

    reason = why_not(device)
    if reason is not None:
        should = installed() and device.type == "cuda"
        return Finding("broken" if should else "absent", "nvdiffrast-triangles", reason)
    return _compared("nvdiffrast", device, expected)


def _compared(rasterizer: Rasterizer, device: torch.device, expected: Tensor) -> Finding:
    """Whether the picture of one rasterizer is the expected one."""
    name = f"{rasterizer}-triangles"
    if rasterizer == "torch" and device.type != "cpu":
        name += f"-{device.type}"
    try:
        difference = float((picture(rasterizer, device) - expected).abs().max())
    except Exception as error:  # whatever a driver says
        return Finding("broken", name, f"does not run: {first_line(error)}")
    if not difference <= _LARGEST[rasterizer]:
        wrong = f"draws a wrong picture: a triangle differs from its formula by {difference:.1g}"
        return Finding("broken", name, wrong)
    detail = f"on {device.type}: a triangle differs from its formula by {difference:.0e}"
    return Finding("ok", name, detail)


def picture(rasterizer: Rasterizer, device: torch.device) -> Tensor:
    """Returns the triangle's picture on the CPU: position and coverage, blended, `[size, size, 4]`."""
    import torch

    from picardopt_3d.cameras import orbit_cameras
    from picardopt_3d.scenes.mesh.rasterize import antialias, interpolate, rasterize
    from picardopt_3d.scenes.mesh.triangles import Triangles

    cameras = orbit_cameras(0.0, 0.0).to(device)
    triangles = Triangles(corners().float().to(device), torch.arange(3, device=device)[None])
    drawn = rasterize(triangles, cameras, _SIZE, _SIZE, rasterizer=rasterizer)
    values = torch.cat([triangles.vertices, torch.ones(3, 1, device=device)], dim=-1)
    image = interpolate(drawn, triangles.faces, values)
    return antialias(image, drawn, triangles, cameras)[0].cpu()


def corners() -> Tensor:
    """Returns the triangle's corners, world units, `[3, 3]`."""
    import torch

    edge, third = _CORNERS
    places = [(_OFFSET + _SLOPE * (row - 0.5), row, depth) for row, depth in edge]
    column, row, depth = torch.tensor([*places, third], dtype=torch.float64).T
    # The camera is on the x axis: x is towards it, y to the right, z up.
    distance, focal = _camera()
    right, up = (column - 0.5 * _SIZE) / focal, (0.5 * _SIZE - row) / focal
    return torch.stack([distance - depth, depth * right, depth * up], dim=-1)


def _camera() -> tuple[float, float]:
    """The distance of the camera, world units, and its focal length, pixels."""
    from picardopt_3d.cameras import orbit_cameras

    cameras = orbit_cameras(0.0, 0.0)
    focal = 0.5 * _SIZE / math.tan(math.radians(float(cameras.fov)) / 2)
    return float(cameras.distance), focal


def formula() -> Tensor:
    """Returns the triangle's picture in closed form, as `picture` does."""
    import torch

    distance, focal = _camera()
    first, second, third = corners()
    place = (torch.arange(_SIZE, dtype=torch.float64) + 0.5 - 0.5 * _SIZE) / focal
    up, right = torch.meshgrid(-place, place, indexing="ij")
    rays = torch.stack([-torch.ones_like(up), right, up], dim=-1)
    eye = torch.tensor([distance, 0.0, 0.0], dtype=torch.float64)
    normal = torch.linalg.cross(second - first, third - first)
    depth = (normal @ (first - eye)) / (rays @ normal)
    sharp = torch.cat([eye + depth[..., None] * rays, torch.ones_like(depth)[..., None]], dim=-1)
    # A pixel that the edge cuts is covered up to it; where its centre is not, it shows what is on its left.
    column = torch.arange(_SIZE, dtype=torch.float64)
    covered = (_OFFSET + _SLOPE * column[:, None] - column).clamp(0, 1)[..., None]
    return (covered * torch.where(covered > 0.5, sharp, sharp.roll(1, dims=1))).float()
