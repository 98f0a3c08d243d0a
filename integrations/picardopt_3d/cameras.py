"""Cameras: where a view is taken from, the rays through its pixels, and the vector that describes it to a score model.

World axes are right-handed with z up; cameras look at the origin, or near it where they are jittered. A camera's own
axes are OpenGL's: x right, y up, looking down -z. Angles are degrees throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CONDITION_SIZE = 14
"""Length of the vector that `Cameras.condition` returns for one view."""

_AZIMUTH_HARMONICS = 4
_ELEVATION_HARMONICS = 2
_USUAL_DISTANCE = 1.65
_USUAL_FOV = 42.5


@dataclass(frozen=True)
class CameraConfig:
    """The distribution of training cameras.

    Attributes:
        elevation: Smallest and largest elevation above the horizon, degrees.
        distance: Smallest and largest distance from the origin, in scene units (objects lie within 0.5 of the origin).
        fov: Smallest and largest vertical field of view, degrees.
        stratified: Whether the azimuths of a batch are spread evenly; otherwise they are drawn independently.
        position_jitter: Largest displacement of a camera along each axis (drawn uniformly), scene units.
        centre_jitter: Standard deviation of the point that a camera looks at, along each axis, scene units.
        up_jitter: Standard deviation of a camera's up direction, along each axis.
    """

    elevation: tuple[float, float] = (-10.0, 60.0)
    distance: tuple[float, float] = (1.5, 1.8)
    fov: tuple[float, float] = (40.0, 45.0)
    stratified: bool = True
    position_jitter: float = 0.0
    centre_jitter: float = 0.0
    up_jitter: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: A range is empty or exceeds a camera's limits, or a jitter is negative.
        """
        limits = {"elevation": (-90.0, 90.0), "distance": (1e-6, math.inf), "fov": (1e-6, 179.0)}
        for name, (smallest, largest) in limits.items():
            low, high = getattr(self, name)
            if not smallest <= low <= high <= largest:
                raise ValueError(
                    f"{name}={(low, high)!r}: give (low, high) with {smallest} <= low <= high <= {largest}"
                )
        for name in ("position_jitter", "centre_jitter", "up_jitter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or a positive number")

    @property
    def middle(self) -> tuple[float, float]:
        """Distance (scene units) and vertical field of view (degrees) in the middle of the ranges."""
        return sum(self.distance) / 2, sum(self.fov) / 2

    @property
    def jittered(self) -> bool:
        """Whether cameras are moved off the sphere or turned away from the origin."""
        return max(self.position_jitter, self.centre_jitter, self.up_jitter) > 0


@dataclass(frozen=True)
class Cameras:
    """A batch of pinhole cameras that look at the origin.

    Attributes:
        camera_to_world: Poses, OpenGL convention, `[batch, 4, 4]`.
        fov: Vertical field of view, degrees, `[batch]`.
        elevation: Angle above the horizon, degrees, `[batch]`.
        azimuth: Angle about the z axis from the x axis, degrees, `[batch]`.
        distance: Distance from the origin, scene units, `[batch]`.
    """

    camera_to_world: Tensor
    fov: Tensor
    elevation: Tensor
    azimuth: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.fov)

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        """Returns some of the cameras, by a slice or an index tensor (not by a number).

        Raises:
            TypeError: The index is a number.
        """
        if isinstance(index, int):
            raise TypeError(
                f"index={index}: a number would drop the batch dimension; use cameras[{index}:{index + 1}]"
            )
        return Cameras(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str | torch.dtype) -> Cameras:
        """Returns the same cameras on another device, or in another type of number."""
        return Cameras(
            **{field.name: getattr(self, field.name).to(device) for field in fields(self)}
        )

    @property
    def position(self) -> Tensor:
        """Positions of the cameras, scene units, `[batch, 3]`."""
        return self.camera_to_world[:, :3, 3]

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns the rays through the pixel centers, row 0 on top.

        Args:
            height: Rows of pixels.
            width: Columns of pixels; pixels are square, which fixes the horizontal field of view.

        Returns:
            Origins and unit directions in the world, each `[batch, height, width, 3]`.
        """
        like: dict[str, Any] = {"dtype": self.fov.dtype, "device": self.fov.device}
        half = torch.tan(torch.deg2rad(self.fov) / 2)[:, None, None]  # [batch, 1, 1]
        rows = (1 - (2 * torch.arange(height, **like) + 1) / height)[None, :, None] * half
        columns = ((2 * torch.arange(width, **like) + 1 - width) / height)[None, None, :] * half
        shape = (len(self), height, width)
        local = torch.stack(
            [columns.expand(shape), rows.expand(shape), -torch.ones(shape, **like)], dim=-1
        )
        rotation = self.camera_to_world[:, None, None, :3, :3]
        directions = (rotation @ local[..., None]).squeeze(-1)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.position[:, None, None].expand_as(directions), directions

    def condition(self) -> Tensor:
        """Returns the vector that describes each camera to a view-conditioned score model.

        It holds harmonics of the azimuth (1 to 4) and of the elevation (1 and 2), then distance and field of view
        relative to their usual values. No camera has the zero vector, so that zeros can stand for "unknown".

        Returns:
            One vector per camera, `[batch, CONDITION_SIZE]`.
        """
        azimuth, elevation = torch.deg2rad(self.azimuth), torch.deg2rad(self.elevation)
        parts = [
            f(n * azimuth) for n in range(1, _AZIMUTH_HARMONICS + 1) for f in (torch.sin, torch.cos)
        ]
        parts += [
            f(n * elevation)
            for n in range(1, _ELEVATION_HARMONICS + 1)
            for f in (torch.sin, torch.cos)
        ]
        parts += [5 * torch.log(self.distance / _USUAL_DISTANCE), (self.fov - _USUAL_FOV) / 5]
        return torch.stack(parts, dim=-1)


def orbit_cameras(
    elevation: Tensor | float,
    azimuth: Tensor | float,
    distance: Tensor | float = _USUAL_DISTANCE,
    fov: Tensor | float = _USUAL_FOV,
) -> Cameras:
    """Returns cameras on spheres about the origin, upright and looking at it.

    Args:
        elevation: Degrees above the horizon, a number or `[batch]`.
        azimuth: Degrees about the z axis from the x axis, a number or `[batch]`.
        distance: Distance from the origin in scene units, a number or `[batch]`.
        fov: Vertical field of view in degrees, a number or `[batch]`.

    Returns:
        The cameras; numbers are broadcast to the batch size of the tensors.
    """
    given = [torch.as_tensor(x, dtype=torch.float32) for x in (elevation, azimuth, distance, fov)]
    same: list[Tensor] = torch.broadcast_tensors(*(x.reshape(-1) for x in given))
    elevation, azimuth, distance, fov = same
    up, around = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    # Written out, without cross products with "up", so that the poles need no special case.
    backward = torch.stack(
        [up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], dim=-1
    )  # [batch, 3]
    right = torch.stack([-around.sin(), around.cos(), torch.zeros_like(around)], dim=-1)
    above = torch.stack([-up.sin() * around.cos(), -up.sin() * around.sin(), up.cos()], dim=-1)
    pose = torch.eye(4, device=fov.device).repeat(len(fov), 1, 1)
    pose[:, :3, :3] = torch.stack([right, above, backward], dim=-1)
    pose[:, :3, 3] = backward * distance[:, None]
    return Cameras(pose, *(x.contiguous() for x in (fov, elevation, azimuth, distance)))


def random_cameras(
    batch: int, config: CameraConfig | None = None, device: torch.device | str = "cpu"
) -> Cameras:
    """Draws training cameras as DreamFusion does.

    The elevation is uniform in degrees for half of the views and uniform on the sphere's area for the other half
    (chosen by a fair coin for each view); the azimuth is stratified over the batch. Everything is drawn from torch's
    global CPU generator, so that the cameras of a step are the same on every device. Jittered cameras keep the angles
    and the distance from before the jitter, which prompts and score models use.

    Args:
        batch: Number of cameras.
        config: The ranges; by default those that the shipped guidance was trained on.
        device: Device of the cameras.
    """
    config = config or CameraConfig()
    draws = torch.rand(5, batch)
    low, high = config.elevation
    in_degrees = low + (high - low) * draws[0]
    sine_low, sine_high = math.sin(math.radians(low)), math.sin(math.radians(high))
    on_sphere = torch.rad2deg(torch.asin(sine_low + (sine_high - sine_low) * draws[0]))
    elevation = torch.where(draws[1] < 0.5, in_degrees, on_sphere)
    around = (torch.arange(batch) + draws[2]) / batch if config.stratified else draws[2]
    azimuth = around * 360 - 180
    distance = config.distance[0] + (config.distance[1] - config.distance[0]) * draws[3]
    fov = config.fov[0] + (config.fov[1] - config.fov[0]) * draws[4]
    cameras = orbit_cameras(elevation, azimuth, distance, fov)
    return (_jitter(cameras, config) if config.jittered else cameras).to(device)


def _jitter(cameras: Cameras, config: CameraConfig) -> Cameras:
    """Moves cameras, their targets and their up directions at random, drawn from torch's global CPU generator."""
    draws = torch.rand(len(cameras), 3), torch.randn(len(cameras), 3), torch.randn(len(cameras), 3)
    position = cameras.position + config.position_jitter * (2 * draws[0] - 1)
    backward = functional.normalize(position - config.centre_jitter * draws[1], dim=-1)
    up = position.new_tensor([0.0, 0.0, 1.0]) + config.up_jitter * draws[2]
    right = functional.normalize(torch.cross(up, backward, dim=-1), dim=-1)
    pose = cameras.camera_to_world.clone()
    pose[:, :3, :3] = torch.stack([right, torch.cross(backward, right, dim=-1), backward], dim=-1)
    pose[:, :3, 3] = position
    return replace(cameras, camera_to_world=pose)


def turntable_cameras(
    count: int,
    elevation: float = 15.0,
    distance: float = _USUAL_DISTANCE,
    fov: float = _USUAL_FOV,
) -> Cameras:
    """Returns cameras spaced evenly around the object, at one elevation.

    Args:
        count: Number of cameras; azimuths are 0, 360 / count, ...
        elevation: Degrees above the horizon.
        distance: Distance from the origin, scene units.
        fov: Vertical field of view, degrees.
    """
    return orbit_cameras(elevation, torch.arange(count) * (360.0 / count), distance, fov)
