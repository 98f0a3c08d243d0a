"""The built-in world: eight shapes in eight colours, rendered exactly, with captions.

The shipped guidance model is trained on these views, the tests use them as known answers, and a result is judged
against them. Shapes are signed distance functions within a sphere of radius 0.5 about the origin, z up. The light is
fixed in the world and the surfaces are matt, so a point looks the same from everywhere: a radiance field can show
these objects exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras

BACKGROUND = (1.0, 1.0, 1.0)
"""The plain background behind every view, RGB."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.65, 0.15),
    "cyan": (0.10, 0.75, 0.85),
    "blue": (0.10, 0.20, 0.90),
    "purple": (0.55, 0.10, 0.75),
    "brown": (0.45, 0.25, 0.10),
}

CAPTIONS = (
    "a {colour} {shape}",
    "a 3d render of a {colour} {shape}",
    "a picture of a {colour} {shape}",
    "the {colour} {shape}",
    "a {shape} that is {colour}",
    "{colour} {shape}",
)
"""Ways to say the same thing; the first is the canonical one."""

_LIGHT = (
    0.48,
    -0.36,
    0.80,
)  # unit length; a different angle to each axis, so that no two faces of a cube look alike
_AMBIENT = 0.30
_SPHERE_RADIUS = 0.52  # every shape lies within; rays are traced inside it only
_LEAST_STEP = 2e-3  # of a traced ray: it cuts through a surface instead of creeping along it
_REFINEMENTS = 4


def _box(
    points: Tensor, centre: tuple[float, float, float], half: tuple[float, float, float]
) -> Tensor:
    away = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
    distance: Tensor = away.clamp(min=0).norm(dim=-1) + away.amax(dim=-1).clamp(max=0)
    return distance


def _ball(points: Tensor, centre: tuple[float, float, float], radius: float) -> Tensor:
    distance: Tensor = (points - points.new_tensor(centre)).norm(dim=-1) - radius
    return distance


def _tube(points: Tensor, radius: float, low: float, high: float) -> Tensor:
    """An upright solid cylinder between two heights."""
    sideways = points[..., :2].norm(dim=-1) - radius
    upward = (points[..., 2] - (low + high) / 2).abs() - (high - low) / 2
    away = torch.stack([sideways, upward], dim=-1)
    distance: Tensor = away.clamp(min=0).norm(dim=-1) + away.amax(dim=-1).clamp(max=0)
    return distance


def _ring(points: Tensor, major: float, minor: float) -> Tensor:
    """A torus about the z axis."""
    sideways = points[..., :2].norm(dim=-1) - major
    return torch.hypot(sideways, points[..., 2]) - minor


def _sphere(points: Tensor) -> Tensor:
    return _ball(points, (0.0, 0.0, 0.0), 0.40)


def _cube(points: Tensor) -> Tensor:
    return _box(points, (0.0, 0.0, 0.0), (0.29, 0.29, 0.29))


def _cylinder(points: Tensor) -> Tensor:
    return _tube(points, 0.23, -0.42, 0.42)


def _cone(points: Tensor) -> Tensor:
    """Apex at z = 0.46, base of radius 0.34 at z = -0.34; the bound is exact on the surface and never too large."""
    radius, apex, base = 0.34, 0.46, -0.34
    slant = (radius**2 + (apex - base) ** 2) ** 0.5
    side = (points[..., :2].norm(dim=-1) * (apex - base) + (points[..., 2] - apex) * radius) / slant
    return torch.maximum(side, base - points[..., 2])


def _torus(points: Tensor) -> Tensor:
    return _ring(points, 0.34, 0.13)


def _chair(points: Tensor) -> Tensor:
    seat = _box(points, (0.0, 0.0, -0.06), (0.24, 0.24, 0.05))
    back = _box(points, (-0.20, 0.0, 0.17), (0.04, 0.24, 0.20))
    mirrored = torch.cat([points[..., :2].abs(), points[..., 2:]], dim=-1)  # four legs as one
    leg = _box(mirrored, (0.19, 0.19, -0.25), (0.05, 0.05, 0.15))
    return torch.minimum(torch.minimum(seat, back), leg)


def _mug(points: Tensor) -> Tensor:
    shifted = points + points.new_tensor(
        (0.10, 0.0, 0.0)
    )  # room for the handle, which lies along +x
    body = torch.maximum(_tube(shifted, 0.27, -0.33, 0.33), -_tube(shifted, 0.21, -0.26, 0.40))
    upright = torch.stack([shifted[..., 0] - 0.28, shifted[..., 2], shifted[..., 1]], dim=-1)
    handle = torch.maximum(_ring(upright, 0.17, 0.055), 0.24 - shifted[..., :2].norm(dim=-1))
    return torch.minimum(body, handle)


def _snowman(points: Tensor) -> Tensor:
    body = torch.minimum(
        _ball(points, (0.0, 0.0, -0.20), 0.27), _ball(points, (0.0, 0.0, 0.18), 0.20)
    )
    nose_points = points - points.new_tensor((0.18, 0.0, 0.18))  # a carrot along +x
    along = nose_points[..., 0]
    side = (nose_points[..., 1:].norm(dim=-1) * 0.20 + (along - 0.20) * 0.07) / (
        0.20**2 + 0.07**2
    ) ** 0.5
    nose = torch.maximum(side, -along)
    hat = torch.minimum(_tube(points, 0.19, 0.32, 0.35), _tube(points, 0.11, 0.32, 0.47))
    return torch.minimum(torch.minimum(body, nose), hat)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "chair": _chair,
    "mug": _mug,
    "snowman": _snowman,
}
"""Signed distance (or a lower bound of it) of points [..., 3] to each shape."""


@dataclass(frozen=True)
class Subject:
    """One thing of the built-in world: a shape in a colour."""

    shape: str
    colour: str

    def __post_init__(self) -> None:
        """Check the words.

        Raises:
            ValueError: The shape or the colour is not one of the built-in ones.
        """
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: give one of {', '.join(known)}")

    @property
    def caption(self) -> str:
        """The canonical caption, such as "a red cube"."""
        return CAPTIONS[0].format(colour=self.colour, shape=self.shape)

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption that training uses for it."""
        return tuple(text.format(colour=self.colour, shape=self.shape) for text in CAPTIONS)


def all_subjects() -> tuple[Subject, ...]:
    """Every shape in every colour, shapes outermost."""
    return tuple(Subject(shape, colour) for shape in SHAPES for colour in COLOURS)


def held_out_subjects() -> tuple[Subject, ...]:
    """Eight subjects, each shape and each colour once, that the shipped text models never saw in training."""
    colours = list(COLOURS)
    return tuple(
        Subject(shape, colours[(index + 3) % len(colours)]) for index, shape in enumerate(SHAPES)
    )


def parse_prompt(prompt: str) -> Subject | None:
    """The subject that a prompt speaks of, or None where it is not one of the built-in world's.

    A prompt is in the domain if it names exactly one built-in shape and exactly one built-in colour, each once.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    if len(shapes) != 1 or len(colours) != 1:
        return None
    return Subject(shapes[0], colours[0])


def _trace(
    distance: Callable[[Tensor], Tensor], origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Sphere-trace rays inside the bounding sphere.

    Args:
        distance: The signed distance function.
        origins: [rays, 3]
        directions: Unit directions. [rays, 3]

    Returns:
        The points reached [rays, 3] and whether they lie on the surface [rays].

    A ray hits where it is found inside, never where it is merely near: a tolerance would thicken every silhouette.
    What a step of `_LEAST_STEP` can jump over is a millionth deep on round shapes, and half a step on an edge.
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
    for _ in range(
        _REFINEMENTS
    ):  # back out to the surface: no farther than the (negative) distance
        travelled[found] += distance(origins[found] + travelled[found, None] * directions[found])
    return origins + travelled[:, None] * directions, hit


def _normals(distance: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Unit normals by central differences. [points, 3]."""
    offsets = 1e-3 * torch.eye(3, dtype=points.dtype, device=points.device)
    slopes = [distance(points + offset) - distance(points - offset) for offset in offsets]
    return torch.nn.functional.normalize(torch.stack(slopes, dim=-1), dim=-1)


def render_shading(
    shape: str, cameras: Cameras, height: int, width: int, samples: int = 2
) -> Tensor:
    """Views of a shape without its colour.

    A subject's view is linear in these: `shading * colour + (1 - alpha) * background`.

    Args:
        shape: One of `SHAPES`.
        cameras: Where from.
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
    """Give views from `render_shading` a colour and a background.

    Args:
        shaded: [batch, 2, height, width]
        colours: RGB in [0, 1]. [batch, 3] or [3]
        background: The same for what lies behind; by default `BACKGROUND`.

    Returns:
        RGB views in [0, 1]. [batch, 3, height, width]
    """
    behind = shaded.new_tensor(BACKGROUND) if background is None else background
    shading, alpha = shaded[:, :1], shaded[:, 1:]
    return shading * colours[..., :, None, None] + (1 - alpha) * behind[..., :, None, None]


def render(
    subject: Subject, cameras: Cameras, height: int, width: int, samples: int = 2
) -> tuple[Tensor, Tensor]:
    """True views of a subject.

    Args:
        subject: What.
        cameras: Where from.
        height: Pixels down.
        width: Pixels across.
        samples: Rays a pixel along each axis.

    Returns:
        RGB in [0, 1] on the fixed background [batch, 3, height, width], and alpha [batch, 1, height, width].
    """
    shaded = render_shading(subject.shape, cameras, height, width, samples)
    return colourize(shaded, shaded.new_tensor(COLOURS[subject.colour])), shaded[:, 1:]
