"""The texture of a mesh, from another scene: means over many views of it, and its colours in space.

Each texel is looked up in every view that sees it, and gets the mean of what they show, weighted by how squarely they
look at it: sums, which do not depend on the order of the views.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.config import TexturedMeshConfig
from picardopt_3d.scenes.mesh.geometry import vertex_normals
from picardopt_3d.scenes.mesh.rasterize import interpolate, rasterize
from picardopt_3d.scenes.mesh.screen import NEAR, on_screen
from picardopt_3d.scenes.mesh.surfaces import POINTS_AT_ONCE
from picardopt_3d.scenes.mesh.texels import Texels, spread, texels_of
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped
from picardopt_3d.scenes.mesh.viewpoints import VIEWS, views_around
from picardopt_3d.scenes.scene import Scene

_LEAST_COSINE = 0.1  # between the normal and the direction to a camera that sees a texel
_OPAQUE = 0.5  # alpha of a view from which on it shows a colour
_SLACK = 4.0  # by how many pixels' widths the depths around a texel may at most differ from its own
_LEAST_WEIGHT = 1e-3  # of what all views together show of a texel


class Seen:
    """What views show of points of a mesh: sums that grow view by view.

    Args:
        triangles: The mesh.
        texels: Where its points are.
    """

    def __init__(self, triangles: Triangles, texels: Texels) -> None:
        self.triangles, self.points = triangles, texels.points(triangles)
        normals = vertex_normals(triangles)[triangles.faces[texels.face]]
        self.normals = F.normalize((texels.barycentric[:, :, None] * normals).sum(1), dim=1)
        self.colours = self.points.new_zeros(len(self.points), 3, dtype=torch.float64)
        self.weights = self.points.new_zeros(len(self.points), dtype=torch.float64)

    @torch.no_grad()
    def add(self, camera: Cameras, rgb: Tensor, opacity: Tensor) -> None:
        """Adds what one view shows.

        Args:
            camera: Where it is taken from; one camera.
            rgb: Its colours over black, `[1, 3, size, size]`.
            opacity: Its alpha, `[1, 1, size, size]`.
        """
        size = rgb.shape[-1]
        towards = F.normalize(camera.position - self.points, dim=1)
        cosine = (towards * self.normals).sum(1)
        near = (cosine > _LEAST_COSINE).nonzero().squeeze(1)
        cosine = cosine[near]
        screen = on_screen(self.points[near], camera, size)
        far = screen.depth[0]
        at = torch.stack([screen.x[0], screen.y[0]], dim=1) / far[:, None]  # from the middle
        at = at + (size / 2 - 0.5)  # centres of pixels are whole numbers
        seen = torch.cat([rgb, opacity], 1)[0].movedim(0, -1)
        mixed, nearest, farthest = _around(at, seen, self._depths(camera, size))
        # On a plane, the depths of pixels around differ by as much as it is slanted.
        pixel = 2 * math.tan(math.radians(float(camera.fov[0]) / 2)) / size * far
        slack = pixel * (0.5 + 1.5 * (1 / cosine.square() - 1).clamp_min(0).sqrt()).clamp_max(
            _SLACK
        )
        visible = (nearest > far - slack) & (farthest < far + slack) & (mixed[:, 3] > _OPAQUE)
        visible &= (far > NEAR) & ((at >= 0) & (at <= size - 1)).all(1)
        weight = torch.where(visible, cosine.square() * mixed[:, 3], 0.0).double()
        colour = mixed[:, :3] / mixed[:, 3:].clamp_min(_OPAQUE)
        self.weights[near] += weight
        self.colours[near] += weight[:, None] * colour.double()

    def _depths(self, camera: Cameras, size: int) -> Tensor:
        """Returns the depth of the mesh at each pixel, infinite where there is none, `[size, size, 1]`."""
        faces = self.triangles.faces
        fragments = rasterize(self.triangles, camera, size, size, rasterizer="torch")
        depths = on_screen(self.triangles.vertices, camera, size).depth[0]
        found = interpolate(fragments, faces, depths[:, None])[0]
        return torch.where(fragments.face[0][..., None] >= 0, found, torch.inf)

    def mean(self) -> Tensor:
        """Returns the colours, RGB in [0, 1], black where no view sees a point, `[count, 3]`."""
        return (self.colours / self.weights.clamp_min(1e-12)[:, None]).float().clamp(0, 1)


def _around(at: Tensor, seen: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the four pixels around places show.

    Args:
        at: Columns and rows, whole numbers at the centres of pixels, `[count, 2]`.
        seen: What the pixels show, `[size, size, channels]`.
        depths: Their depths, `[size, size, 1]`.

    Returns:
        What they show, interpolated, `[count, channels]`, and their least and largest depth, each `[count]`.
    """
    low = at.floor().long().clamp(0, len(seen) - 2)
    right, down = (at - low).unbind(1)
    mixed, found = seen.new_zeros(len(at), seen.shape[-1]), []
    for row, above in ((0, 1 - down), (1, down)):
        for column, beside in ((0, 1 - right), (1, right)):
            place = (low[:, 1] + row, low[:, 0] + column)
            mixed = mixed + (above * beside)[:, None] * seen[place]
            found.append(depths[place][:, 0])
    together = torch.stack(found)
    return mixed, together.amin(0), together.amax(0)


@torch.no_grad()
def bake(
    triangles: Triangles,
    unwrapped: Unwrapped,
    other: Scene,
    config: TexturedMeshConfig,
    *,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Returns the texture of a mesh in the colours of another scene, RGB in [0, 1], row 0 on top, `[size, size, 3]`.

    A scene that consists of triangles knows the colours on them. Of any other, a texel that no view sees has the colour
    at its place in space, if the scene has one, or else, like all between the charts, that of the nearest texel.

    Args:
        triangles: The mesh, on the other scene's device.
        unwrapped: Where its triangles lie on the texture.
        other: The other scene.
        config: Size of the texture and which views are taken.
        progress: Called with 1 after each of `VIEWS` views.
    """
    size = config.texture
    texels = texels_of(unwrapped, size)
    shell = other.shell()
    if shell is not None:
        parts = texels.points(triangles).split(POINTS_AT_ONCE)
        own = torch.cat([shell.colour(part) for part in parts]).clamp(0, 1)
        return spread(own, texels.place, size)
    found = Seen(triangles, texels)
    reach = float(triangles.vertices.norm(dim=1).max())
    cameras = views_around(reach, config.view_distance, config.view_fov)
    cameras = cameras.to(triangles.vertices.device)
    black = torch.zeros(1, 3, device=other.device)
    for index in range(VIEWS):
        camera = cameras[index : index + 1]
        view = other.render(camera, config.view_pixels, background=black)
        found.add(camera, view.rgb, view.opacity)
        if progress is not None:
            progress(1)
    colours, known = found.mean(), found.weights > _LEAST_WEIGHT
    in_space = _colour_in_space(other)
    if in_space is not None and not bool(known.all()):
        hidden = found.points[~known].split(POINTS_AT_ONCE)
        colours[~known] = torch.cat([in_space(part) for part in hidden]).clamp(0, 1)
        known = torch.ones_like(known)
    if not bool(known.any()):
        return colours.new_full((size, size, 3), 0.5)
    return spread(colours[known], texels.place[known], size)


def _colour_in_space(other: Scene) -> Callable[[Tensor], Tensor] | None:
    """Returns a scene's colour as a function of points, None if it has none."""
    try:
        return other.surface().colour
    except ValueError:
        return None
