"""Meshes for tests, and an independent oracle of what a camera sees of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.triangles import Triangles


def random_triangles(
    count: int, size: float = 0.3, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Triangles:
    """Loose triangles about the origin, within a ball of radius about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 1, 3, generator=generator, dtype=torch.float64) - 0.5
    around = torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)
    vertices = 0.6 * centres + size * around
    return Triangles(vertices.reshape(-1, 3).to(dtype), torch.arange(3 * count).view(count, 3))


def sphere(
    subdivisions: int = 2, radius: float = 0.5, dtype: torch.dtype = torch.float64
) -> Triangles:
    """A closed mesh: an icosahedron whose faces are split `subdivisions` times."""
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    vertices = torch.from_numpy(np.array(mesh.vertices)).to(dtype)
    return Triangles(vertices, torch.from_numpy(np.array(mesh.faces)).long())


def exact(cameras: Cameras) -> Cameras:
    """The cameras in float64, with axes at right angles to all its digits."""
    cameras = cameras.to(torch.float64)
    pose = cameras.camera_to_world.clone()
    left, _, right = torch.linalg.svd(pose[:, :3, :3])
    pose[:, :3, :3] = left @ right
    return replace(cameras, camera_to_world=pose)


def grid(cells: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Triangles:
    """A square at x = 0 across the axis of a camera on the x axis, of 2 * cells * cells triangles."""
    place = torch.linspace(-0.5, 0.5, cells + 1, dtype=torch.float64) * size
    z, y = torch.meshgrid(place, place, indexing="ij")
    vertices = torch.stack([torch.zeros_like(y), y, z], dim=-1).view(-1, 3)
    number = torch.arange((cells + 1) ** 2).view(cells + 1, cells + 1)
    a, b, c, d = (
        x.reshape(-1) for x in (number[:-1, :-1], number[:-1, 1:], number[1:, 1:], number[1:, :-1])
    )
    faces = torch.cat([torch.stack([a, b, c], dim=-1), torch.stack([a, c, d], dim=-1)])
    return Triangles(vertices.to(dtype), faces)


def seen_by_rays(
    triangles: Triangles, cameras: Cameras, height: int, width: int, near: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Faces, weights of their corners and distances along the rays, by Moller and Trumbore's test of all pairs.

    What is nearer than `near` along the camera's axis is not seen.
    """
    origins, directions = (
        x.double().reshape(-1, 1, 3).numpy() for x in cameras.rays(height, width)
    )
    axis = -cameras.camera_to_world[:, None, None, :3, 2].double().expand(-1, height, width, -1)
    slope = (directions * axis.reshape(-1, 1, 3).numpy()).sum(-1)  # of depth against distance
    corners = triangles.vertices.detach().double().numpy()[triangles.faces.numpy()]
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.cross(directions, edge2)
        inverse = 1 / (p * edge1).sum(-1)
        away = origins - corners[:, 0]
        u = (away * p).sum(-1) * inverse
        q = np.cross(away, edge1)
        v = (directions * q).sum(-1) * inverse
        distance = (edge2 * q).sum(-1) * inverse
        hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance * slope >= near) & (distance > 0)
    distance = np.where(hit, distance, np.inf)
    face = distance.argmin(1)
    rays = np.arange(len(face))
    u, v, nearest = u[rays, face], v[rays, face], distance[rays, face]
    seen = np.isfinite(nearest)
    shares = np.where(seen[:, None], np.stack([1 - u - v, u, v], axis=-1), 0)
    shape = (len(cameras), height, width)
    return (
        np.where(seen, face, -1).reshape(shape),
        shares.reshape(*shape, 3),
        nearest.reshape(shape),
    )
