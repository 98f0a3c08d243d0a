"""The camera of a client as one of ours."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.splats import rotation_matrices

Vector = npt.NDArray[np.float64]


def camera_of(wxyz: Vector, position: Vector, fov: float) -> Cameras:
    """Returns a client's camera.

    Args:
        wxyz: Rotation from the camera's axes to the world's, a quaternion; OpenCV's axes: x right, y down, z forward.
        position: World units.
        fov: Vertical field of view, radians.
    """
    x, y, z = position.tolist()
    pose = torch.eye(4)
    turned = rotation_matrices(torch.tensor([wxyz.tolist()]))[0]
    pose[:3, :3] = turned * torch.tensor([1.0, -1.0, -1.0])  # OpenGL's: y up, looking down -z
    pose[:3, 3] = torch.tensor([x, y, z])
    distance = math.sqrt(x * x + y * y + z * z)
    elevation = math.degrees(math.asin(z / distance)) if distance else 0.0
    azimuth = math.degrees(math.atan2(y, x))
    numbers = (math.degrees(fov), elevation, azimuth, distance)
    return Cameras(pose[None], *(torch.tensor([number]) for number in numbers))
