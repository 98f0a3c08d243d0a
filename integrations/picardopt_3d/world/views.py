"""True views of the built-in world, by sphere tracing.

The light is fixed in the world and the surfaces are matt, so a point looks the same from everywhere: a radiance field
can show these objects exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.world.shapes import SHAPES
from picardopt_3d.world.subjects import BACKGROUND, COLOURS, Subject

# Unit length; a different angle to each axis, so that no two faces of a cube look alike.
_LIGHT = (0.48, -0.36, 0.80)
_AMBIENT = 0.30
_SPHERE_RADIUS = 0.52  # every shape lies within; rays are traced inside it only
_LEAST_STEP = 2e-3  # of a traced ray: it cuts through a surface instead of creeping along it
_REFINEMENTS = 4
_RAYS_AT_ONCE = 1 << 16  # pixels of true views that are traced in one call


def _trace(
    distance: Callable[[Tensor], Tensor], origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Sphere-traces rays inside the bounding sphere.

    A ray hits where a point of it is found inside, never where it is merely near: a tolerance would thicken every
    silhouette. What a step of `_LEAST_STEP` can jump over is a millionth deep on round shapes, and half a step on an
    edge.

    Args:
        distance: The signed distance function.
        origins: [rays, 3]
        directions: Unit directions. [rays, 3]

    Returns:
        The points reached [rays, 3] and whether they lie on the surface [rays].
    """
    middle = -(origins * directions).sum(-1)
    inside = _SPHERE_RADIUS**2 - (origins.square().sum(-1) - middle.square())
    half = inside.clamp(min=0).sqrt()
    travelled, far = (middle - half).clamp(min=0), middle + half
    hit = torch.zeros_like(inside, dtype=torch.bool)
    active = torch.nonzero((inside > 0) & (far > 0)).squeeze(-1)
    while len(active):
        gap = distance(origins[active] + travelled[active, None] * directions[active])
        hit[active[gap < 0]] = True
        travelled[active] += torch.where(gap < 0, 0, gap.clamp(min=_LEAST_STEP))
        active = active[(gap >= 0) & (travelled[active] < far[active])]
    found = torch.nonzero(hit).squeeze(-1)
    for _ in range(_REFINEMENTS):
        # Back out to the surface: no farther than the (negative) distance.
        travelled[found] += distance(origins[found] + travelled[found, None] * directions[found])
    return origins + travelled[:, None] * directions, hit


def _normals(distance: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Returns unit normals, by central differences. [points, 3]."""
    offsets = 1e-3 * torch.eye(3, dtype=points.dtype, device=points.device)
    slopes = [distance(points + offset) - distance(points - offset) for offset in offsets]
    return torch.nn.functional.normalize(torch.stack(slopes, dim=-1), dim=-1)


def render_shading(
    shape: str, cameras: Cameras, height: int, width: int, samples: int = 2
) -> Tensor:
    """Renders views of a shape without its colour.

    A subject's view is linear in these: `shading * colour + (1 - alpha) * background`.

    Args:
        shape: One of `SHAPES`.
        cameras: Where the views are taken from.
        height: Pixels down.
        width: Pixels across.
        samples: Rays a pixel along each axis, averaged (anti-aliasing).

    Returns:
        Shading (brightness times coverage) and alpha, [batch, 2, height, width].
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: give one of {', '.join(SHAPES)}")
    distance = SHAPES[shape]
    origins, directions = (
        x.reshape(-1, 3) for x in cameras.rays(height * samples, width * samples)
    )
    points, hit = _trace(distance, origins, directions)
    cosine = _normals(distance, points[hit]) @ points.new_tensor(_LIGHT)
    shading = torch.zeros_like(points[:, 0])
    shading[hit] = _AMBIENT + (1 - _AMBIENT) * (0.5 + 0.5 * cosine)  # half-Lambert: no side is flat
    fine = torch.stack([shading, hit.to(shading.dtype)]).view(
        2, len(cameras), height * samples, width * samples
    )
    return torch.nn.functional.avg_pool2d(fine, samples).transpose(0, 1)


def colourize(shaded: Tensor, colours: Tensor, background: Tensor | None = None) -> Tensor:
    """Gives views from `render_shading` a colour and a background.

    Args:
        shaded: [batch, 2, height, width]
        colours: RGB in [0, 1]. [batch, 3] or [3]
        background: RGB behind the object; by default `BACKGROUND`. [batch, 3] or [3]

    Returns:
        RGB views in [0, 1]. [batch, 3, height, width]
    """
    if background is None:
        background = shaded.new_tensor(BACKGROUND)
    shading, alpha = shaded[:, :1], shaded[:, 1:]
    return shading * colours[..., :, None, None] + (1 - alpha) * background[..., :, None, None]


def render(
    subject: Subject, cameras: Cameras, height: int, width: int, samples: int = 2
) -> tuple[Tensor, Tensor]:
    """Renders true views of a subject.

    Args:
        subject: What to show.
        cameras: Where the views are taken from.
        height: Pixels down.
        width: Pixels across.
        samples: Rays a pixel along each axis.

    Returns:
        RGB in [0, 1] on the fixed background [batch, 3, height, width], and alpha [batch, 1, height, width].
    """
    shaded = render_shading(subject.shape, cameras, height, width, samples)
    return colourize(shaded, shaded.new_tensor(COLOURS[subject.colour])), shaded[:, 1:]


@torch.no_grad()
def true_views(subject: Subject, cameras: Cameras, size: int) -> Tensor:
    """Renders true views, a few at a time to bound memory. [views, 3, size, size]."""
    together = max(1, _RAYS_AT_ONCE // size**2)
    parts = [cameras[start : start + together] for start in range(0, len(cameras), together)]
    return torch.cat([render(subject, part, size, size)[0] for part in parts]).clamp(0, 1)
