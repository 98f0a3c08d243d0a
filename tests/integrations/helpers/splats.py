"""3D Gaussians for tests, and an oracle of their pictures: a loop over pixels and Gaussians."""

from __future__ import annotations

import math

import torch
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.splats import Splats
from torch import Tensor


def random_splats(
    count: int,
    *,
    seed: int = 0,
    scale: float = 0.05,
    spread: float = 0.5,
    radius: float = 0.5,
    degree: int = 0,
    opacity: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Splats:
    """Gaussians in a ball: `spread` is how much their scales differ, `opacity` the middle of their logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ball = torch.nn.functional.normalize(draw(count, 3), dim=-1)
    ball = ball * radius * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    return Splats(
        *(
            tensor.to(dtype)
            for tensor in (
                ball,
                math.log(scale) + spread * draw(count, 3),
                draw(count, 4),
                opacity + 1.5 * draw(count),
                draw(count, 3),
                0.2 * draw(count, (degree + 1) ** 2 - 1, 3),
            )
        )
    )


def leaves(splats: Splats) -> Splats:
    """The same Gaussians, each tensor a leaf that needs its gradient."""
    return Splats(*(tensor.detach().clone().requires_grad_() for tensor in splats))


def one_gaussian(
    splats: Splats, row: int, camera: Tensor, fov: float, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, inverse covariance on the screen and depth of one Gaussian, by the textbook's matrices."""
    w, x, y, z = splats.rotations[row] / splats.rotations[row].norm()
    turn = torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]),
            torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]),
            torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]),
        ]
    )
    shape = turn @ torch.diag(splats.log_scales[row].exp() ** 2) @ turn.T
    flip = torch.diag(camera.new_tensor([1.0, -1.0, -1.0]))
    to_camera = flip @ camera[:3, :3].T
    at = to_camera @ (splats.means[row] - camera[:3, 3])
    focal = 0.5 * height / math.tan(math.radians(fov) / 2)
    tangent = camera.new_tensor([0.5 * width / focal, 0.5 * height / focal])
    depth = at[2]
    slope = torch.minimum(torch.maximum(at[:2] / depth, -1.3 * tangent), 1.3 * tangent)
    zero = torch.zeros_like(depth)
    jacobian = focal * torch.stack(
        [
            torch.stack([1 / depth, zero, -slope[0] / depth]),
            torch.stack([zero, 1 / depth, -slope[1] / depth]),
        ]
    )
    covariance = jacobian @ to_camera @ shape @ to_camera.T @ jacobian.T
    covariance = covariance + 0.3 * torch.eye(2, dtype=covariance.dtype)
    centre = focal * at[:2] / depth + camera.new_tensor([width / 2, height / 2])
    return centre, torch.linalg.inv(covariance), depth


def loop_over_pixels(
    splats: Splats, colours: Tensor, cameras: Cameras, height: int, width: int
) -> Tensor:
    """Pictures of colour, opacity and distance by the formulas, one pixel and one Gaussian at a time.

    Args:
        splats: The Gaussians, float64.
        colours: Their colours from each camera. [views, count, 3]
        cameras: The cameras, float64.
        height: Rows of pixels.
        width: Columns of pixels.

    Returns:
        Pictures. [views, 5, height, width]
    """
    views = []
    for view in range(len(cameras)):
        camera, fov = cameras.camera_to_world[view], float(cameras.fov[view])
        found = []
        for row in range(len(splats.means)):
            centre, inverse, depth = one_gaussian(splats, row, camera, fov, height, width)
            if depth > 0.01:
                found.append((float(depth), row, centre, inverse))
        found.sort(key=lambda one: one[:2])
        opacities = 1 / (1 + torch.exp(-splats.opacity_logits))
        distances = (splats.means - camera[:3, 3]).norm(dim=-1)
        one = torch.ones_like(distances)
        values = torch.cat([colours[view], one[:, None], distances[:, None]], dim=-1)
        pixels = []
        for y in range(height):
            for x in range(width):
                total, left = splats.means.new_zeros(5), splats.means.new_ones(())
                for _, row, centre, inverse in found:
                    off = centre.new_tensor([x + 0.5, y + 0.5]) - centre
                    alpha = opacities[row] * torch.exp(-0.5 * off @ inverse @ off)
                    if alpha < 1 / 255:
                        continue
                    alpha = alpha.clamp(max=0.999)
                    if left * (1 - alpha) <= 1e-4:
                        break
                    total = total + alpha * left * values[row]
                    left = left * (1 - alpha)
                pixels.append(total)
        views.append(torch.stack(pixels).view(height, width, 5).permute(2, 0, 1))
    return torch.stack(views)
