"""The colours and the background of another scene, for a scene of triangles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.scenes.field import Field
from picardopt_3d.scenes.mesh.colours import Colours
from picardopt_3d.scenes.mesh.geometry import face_normals
from picardopt_3d.scenes.mesh.surfaces import POINTS_AT_ONCE
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.networks import Background
from picardopt_3d.scenes.scene import Scene

_STEPS, _POINTS, _RATE = 200, 4096, 0.01
_ON_SURFACE = 1 << 14
"""Points of the surface whose colours are looked up."""

_DEPTHS = (1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0)
"""Where a field is sampled to see its colour at a surface, in cells above it, from the outside in."""

_SPREAD = 1.0
"""How far off the surface colours are fitted, in cells: there the surface may move to."""


def paint(colours: Colours, triangles: Triangles, other: Scene, cell: float) -> None:
    """Makes the colours of a surface those of another scene.

    Those of the same kind are copied. Those of a field are copied if their encoding and network have the same sizes,
    and then trained, like all others, to be what is seen from above: what a field shows is a mixture of what lies on
    its soft surface and below.

    Args:
        colours: The colours to change, on the other scene's device.
        triangles: The surface.
        other: The other scene.
        cell: Distance over which the surface is uncertain, world units.
    """
    copied = colours.copy_from(other)
    if copied and not isinstance(other, Field):
        return
    with torch.no_grad():
        points, normals = scatter(triangles, _ON_SURFACE)
        wanted = _colours_of(other, points, normals, cell)
    parameters = list(colours.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    colours.requires_grad_()
    rate = _RATE / 4 if copied else _RATE
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99), eps=1e-15)
    with torch.enable_grad():
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / _STEPS)
            picked = torch.randint(len(points), (_POINTS,))
            off = cell * _SPREAD * (2 * torch.rand(_POINTS, 1) - 1)
            picked, off = picked.to(points.device), off.to(points)
            found = colours(points[picked] + off * normals[picked])
            optimizer.zero_grad()
            F.mse_loss(found, wanted[:, picked]).backward()
            optimizer.step()
    optimizer.zero_grad()
    for parameter, was in zip(parameters, trained, strict=True):
        parameter.requires_grad_(was)


@torch.no_grad()
def repaint(background: Background, other: Scene) -> None:
    """Makes a neural background another scene's background, if it has one.

    Args:
        background: The background to change; nothing changes if it is solid.
        other: The other scene.
    """
    source = getattr(other, "background", None)
    if background.network is None or not isinstance(source, Background):
        return
    if source.network is not None:
        background.load_state_dict(source.state_dict())
        return
    last = background.network.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.zero_()
    last.bias.copy_(source.colour.logit(1e-3))


def scatter(triangles: Triangles, count: int) -> tuple[Tensor, Tensor]:
    """Draws points uniformly on a surface, from torch's global CPU generator.

    Args:
        triangles: The surface.
        count: Number of points.

    Returns:
        The points and the unit normals of their faces, each `[count, 3]`.
    """
    corners = triangles.vertices[triangles.faces]
    sides = corners[:, 1:] - corners[:, :1]
    areas = torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=1)
    heights = _running_sum(areas, 0)
    draws = torch.rand(count, 3).to(corners)
    face = torch.searchsorted(heights, draws[:, 0] * heights[-1]).clamp_max(len(areas) - 1)
    root = draws[:, 1].sqrt()
    weights = torch.stack([1 - root, root * (1 - draws[:, 2]), root * draws[:, 2]], 1)
    return (weights[..., None] * corners[face]).sum(1), face_normals(triangles)[face]


def _colours_of(other: Scene, points: Tensor, normals: Tensor, cell: float) -> Tensor:
    """Returns the colours of another scene at points of its surface, RGB in [0, 1], `[3, count]`.

    Those of a field are composited along the normal: they are what is seen from above.
    """
    own = getattr(other, "colours", None)
    if isinstance(own, Colours):
        albedo: Tensor = own(points)
        return albedo
    if not isinstance(other, Field):
        return torch.cat([other.surface().colour(part) for part in points.split(POINTS_AT_ONCE)]).T
    depths = cell * points.new_tensor(_DEPTHS)
    along = points[:, None] + depths[:, None] * normals[:, None]  # [count, depths, 3]
    parts = [other.query(part, None, False) for part in along.view(-1, 3).split(POINTS_AT_ONCE)]
    density = torch.cat([part.density for part in parts]).view(len(points), -1)
    colour = torch.cat([part.colour for part in parts], 1).view(3, len(points), -1)
    optical = density * (depths[0] - depths[1])
    weights = torch.exp(optical - _running_sum(optical, 1)) * -torch.expm1(-optical)
    weights = weights + 1e-6  # where there is hardly any density, all samples count alike
    return (weights * colour).sum(2) / weights.sum(1)


def _running_sum(values: Tensor, dim: int) -> Tensor:
    """Returns running sums along a dimension: on the CPU, because torch has none on CUDA whose bits repeat."""
    return values.cpu().cumsum(dim).to(values.device)
