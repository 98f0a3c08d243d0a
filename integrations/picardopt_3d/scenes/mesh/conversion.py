"""The shape of another scene as signed distances at the vertices of a tetrahedral grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.scenes.field import Field
from picardopt_3d.scenes.mesh.geometry import face_normals
from picardopt_3d.scenes.mesh.marching import march
from picardopt_3d.scenes.mesh.surfaces import FAINT, POINTS_AT_ONCE, empty_scene
from picardopt_3d.scenes.mesh.tetrahedra import enclosed
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.scene import Scene
from picardopt_3d.scenes.sdf import SdfField
from picardopt_3d.scenes.volume import inverse_softplus

_FARTHEST = 4.0
"""Distance from the surface, in cells, that all vertices farther off have too."""

_NEAREST = 1e-3
"""Least distance from the surface, in cells, so that a vertex keeps its side."""

_THINNEST, _THICKEST = 1e-6, 1e4
"""Range of densities whose raw values (before the softplus) are compared."""

_RAYS = 40
"""Rays along each edge of a picture that is compared, and samples on each."""

_TETRAHEDRON = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
_NEARBY = 0.2
"""How far from a vertex, along each axis, a field's density is sampled for it, in cells."""

_LOOKS = 4
"""Most times that the cube is made smaller."""

_CANDIDATES = 8
"""Faces with the nearest centres, among which the nearest face is sought."""

_MARGIN = 0.1
"""Space to grow on each side of the shape, as a share of its size."""


@dataclass(frozen=True)
class Cube:
    """Where a grid lies.

    Attributes:
        lattice: Vertices of the grid, in cells from its centre, `[vertices, 3]`.
        resolution: Cells along each edge.
        centre: Its centre, world units, `[3]`.
        cell: Edge of a cell, world units.
    """

    lattice: Tensor
    resolution: int
    centre: Tensor
    cell: float

    def points(self) -> Tensor:
        """Returns the positions of the vertices, world units, `[vertices, 3]`."""
        return self.centre + self.cell * self.lattice


@torch.no_grad()
def shape_of(other: Scene, whole: Cube, border: Tensor) -> tuple[Cube, Tensor]:
    """Returns a cube around another scene's surface, no larger than a given one, and signed distances in it.

    Args:
        other: The other scene: a field, or one that has a surface.
        whole: The largest cube.
        border: Which vertices lie on the border of the grid, where nothing is inside, `[vertices]`.

    Returns:
        The cube, and distances at its vertices in cells, negative inside, limited far off, `[vertices]`.

    Raises:
        NoSurfaceError: The other scene is empty.
        ValueError: It has no surface.
    """
    cube, reach = whole, 0.5 * math.sqrt(3) * whole.cell * whole.resolution
    for look in range(_LOOKS):
        values = _values(other, cube, reach)
        values = torch.where(border, values.abs().clamp_min(1e-3), values)
        if not (values < 0).any():
            raise empty_scene()
        before, cube, reach = cube, *_around(cube, values < 0, whole)
        # A second look is worth while in any case: the level is found by rays through what is inside alone.
        if look and cube.cell > 0.9 * before.cell:
            cube = before
            break
    else:  # the values are those of the cube before
        cube = before
    # Nobody sees a hole in the inside, which fields often have: it would be drawn and smoothed all the same.
    values = torch.where(enclosed(values < 0, cube.resolution), -values.abs(), values)
    if isinstance(other, SdfField):
        return cube, (values / cube.cell).clamp(-_FARTHEST, _FARTHEST)
    triangles = march(cube.lattice, values, cube.resolution)
    return cube, torch.where(values < 0, -1.0, 1.0) * _distances(cube.lattice, triangles)


def _around(cube: Cube, inside: Tensor, whole: Cube) -> tuple[Cube, float]:
    """Returns a smaller cube around the vertices inside, with some space to grow, and the reach of what is inside.

    Args:
        cube: The cube whose vertices they are.
        inside: Which lie inside, `[vertices]`.
        whole: The cube that the smaller one may not leave.

    Returns:
        The cube, and the largest distance of anything inside from its centre, world units.
    """
    places = cube.points()[inside]
    # The surface is up to a cell further out.
    low, high = places.amin(0) - cube.cell, places.amax(0) + cube.cell
    half = 0.5 * whole.resolution
    # The tetrahedra at the border, half a cell deep, stay outside.
    size = float((high - low).max()) * (0.5 + _MARGIN) * half / max(1.0, half - 1)
    size = min(size, half * whole.cell)
    room = half * whole.cell - size
    centre = whole.centre + ((low + high) / 2 - whole.centre).clamp(-room, room)
    reach = float((places - centre).norm(dim=1).max()) + cube.cell
    return Cube(whole.lattice, whole.resolution, centre, size / half), reach


def _values(other: Scene, cube: Cube, reach: float) -> Tensor:
    """Returns values at a cube's vertices that are negative inside a scene: its signed distance, if it has one.

    Args:
        other: The scene.
        cube: The cube.
        reach: Radius of a ball about the cube's centre that holds all of the scene, world units.
    """
    points = cube.points()
    if isinstance(other, Field) and not isinstance(other, SdfField):
        density = _density_of(other)
        level = points.new_tensor(outline_level(density, cube.centre, reach))
        # Trained fields are noisy: a mean over some points leaves fewer pinholes.
        around = cube.cell * _NEARBY * points.new_tensor(_TETRAHEDRON)
        mean = torch.stack([density(points + offset) for offset in around]).mean(0)
        return inverse_softplus(level) - inverse_softplus(mean)
    surface = other.surface()
    depth = _evaluated(surface.level_set, points)
    # Level sets are of any slope: a steep one of the sphere leaves values within it as they are.
    slope = 1.0 if isinstance(other, SdfField) else 1e3
    return torch.maximum(-depth, slope * (points.norm(dim=1) - surface.radius))


def _density_of(other: Field) -> Callable[[Tensor], Tensor]:
    """Returns a field's density as a function of points, limited to a range."""

    def density(points: Tensor) -> Tensor:
        within = points.norm(dim=1) < other.radius
        found = torch.zeros_like(points[:, 0])
        found[within] = _evaluated(other.density, points[within])
        return found.clamp(_THINNEST, _THICKEST)

    return density


def _evaluated(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Returns a function's values at points `[count, 3]`, in parts to save memory, `[count]`."""
    return torch.cat([function(part) for part in points.split(POINTS_AT_ONCE)])


def outline_level(density: Callable[[Tensor], Tensor], centre: Tensor, radius: float) -> float:
    """Returns the density on the surface of a field: the level whose outlines are as large as those of the field.

    Parallel rays through a ball look at the field along the six axes of an icosahedron. As many of them should meet the
    inside of the surface as are at least half as opaque as the most opaque one. A share of the volume would not do: it
    depends on how the inside is counted, which nobody sees, and a soft but thick field, opaque as a whole, has little
    density in each cell. If many levels fit, as those of a hard field do, it is the one closest to half opacity between
    two samples.

    Args:
        density: Maps points `[count, 3]` to densities per world unit, `[count]`.
        centre: Centre of the ball, world units, `[3]`.
        radius: Radius of the ball, world units.

    Raises:
        NoSurfaceError: The field is empty.
    """
    spacing = 2 * radius / _RAYS
    axis = spacing * (torch.arange(_RAYS) - (_RAYS - 1) / 2)
    grid = torch.cartesian_prod(axis, axis, axis).to(centre)
    opacity, highest = [], []
    for frame in _frames():
        values = density(centre + grid @ frame.to(centre)).view(_RAYS**2, _RAYS)
        opacity.append(-torch.expm1(-spacing * values.sum(1)))
        highest.append(values.amax(1))
    opaque, levels = torch.cat(opacity), torch.cat(highest).sort(descending=True).values
    most = float(opaque.max())
    if most < FAINT:
        raise empty_scene()
    count = int((opaque > most / 2).sum())
    above = float(levels[count - 1])
    below = float(levels[count]) if count < len(levels) else 0.0
    # Slightly less, so that rays at this very level, as in a field of one density, count as inside.
    return (1 - 1e-4) * min(max(math.log(2) / spacing, below), above)


def _frames() -> list[Tensor]:
    """Returns orthonormal frames, in rows, whose last axes are those of an icosahedron, each `[3, 3]`."""
    golden = (1 + math.sqrt(5)) / 2
    frames = []
    for turn in range(3):
        for sign in (1.0, -1.0):
            axis = torch.tensor([0.0, 1.0, sign * golden]).roll(turn)
            axis = axis / axis.norm()
            side = torch.tensor([1.0, 0.0, 0.0]).roll(turn)
            frames.append(torch.stack([side, torch.linalg.cross(axis, side), axis]))
    return frames


def _distances(points: Tensor, triangles: Triangles) -> Tensor:
    """Returns the distances of points from triangles, limited to a range, `[points]`.

    Args:
        points: Points, in cells, `[points, 3]`.
        triangles: The triangles, in cells.
    """
    from scipy.spatial import cKDTree  # it takes a while to import

    corners = triangles.vertices[triangles.faces]  # [faces, 3 (corner), 3]
    corners = corners[face_normals(triangles).any(1)]
    tree = cKDTree(corners.mean(1).cpu().numpy())
    # The centre of the nearest face is at most an edge farther off than the face.
    found, index = tree.query(points.cpu().numpy(), _CANDIDATES, distance_upper_bound=_FARTHEST + 1)
    near = torch.from_numpy(found[:, 0]).to(points.device) < _FARTHEST + 1
    candidates = torch.from_numpy(index).to(points.device)[near].clamp_max(len(corners) - 1)
    distances = torch.full_like(points[:, 0], _FARTHEST)
    parts = zip(points[near].split(POINTS_AT_ONCE), candidates.split(POINTS_AT_ONCE), strict=True)
    nearest = [to_triangles(part[:, None], corners[few]).amin(1) for part, few in parts]
    distances[near] = torch.cat(nearest).clamp(_NEAREST, _FARTHEST)
    return distances


def to_triangles(points: Tensor, corners: Tensor) -> Tensor:
    """Returns the distances of points `[..., 3]` from triangles that have an area, `[..., 3 (corner), 3]`, `[...]`."""
    sides = corners.roll(-1, -2) - corners
    away = points[..., None, :] - corners
    normal = torch.linalg.cross(sides[..., 0, :], sides[..., 1, :])[..., None, :]
    above = (torch.linalg.cross(normal.expand_as(sides), sides) * away).sum(-1) >= 0
    plane = (away[..., :1, :] * normal).sum(-1).abs() / normal.norm(dim=-1)
    along = (away * sides).sum(-1) / sides.square().sum(-1)
    edges = (away - along.clamp(0, 1)[..., None] * sides).norm(dim=-1).amin(-1)
    return torch.where(above.all(-1), plane[..., 0], edges)
