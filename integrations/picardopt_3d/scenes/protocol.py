"""What every scene is: parameters in named groups, a renderer, and a surface to take a mesh from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from .occupancy import OccupancyGrid


@dataclass(frozen=True)
class Light:
    """A point light a view, and what is to be seen of the surface under it (DreamFusion, section 3.1).

    Args:
        position: where the lights are, world units. # [batch, 3]
        ambient: share of the colour that is there without the light.
        diffuse: share that falls off with the cosine between normal and light.
        textureless: show the shading alone, as if all albedo were white.
    """

    position: Tensor
    ambient: float = 0.1
    diffuse: float = 0.9
    textureless: bool = False


@dataclass(frozen=True)
class Render:
    """What a batch of rays sees.

    Args:
        rgb: colour over the background. # [batch, 3, height, width], in [0, 1]
        opacity: accumulated alpha. # [batch, 1, height, width], in [0, 1]
        depth: expected distance from the camera, world units. # [batch, 1, height, width]
        normal: expected outward normal, not normalised; None if not asked for.
            # [batch, 3, height, width]
        back_facing: mean over rays of the weight on normals that face away from the camera,
            sum_i w_i max(0, n_i . d)^2 (Ref-NeRF's orientation penalty); None without normals.
        roughness: mean over samples and axes of |n(x) - n(x + 0.01 noise)|, the 3D normal smoothness penalty of
            threestudio's Zero-1-to-3; None if not asked for.
        eikonal: mean over samples of (|grad sdf| - 1)^2; None unless the scene is a signed distance
            and normals were asked for.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None = None
    back_facing: Tensor | None = None
    roughness: Tensor | None = None
    eikonal: Tensor | None = None


class Scene(nn.Module, ABC):
    """Something in a sphere about the origin that can be optimised, rendered and cut out as a mesh.

    Attributes:
        radius: of the sphere that holds everything, world units.
        occupancy: where there is something, if the scene keeps a grid of it; its values are a carry.
    """

    radius: float
    occupancy: OccupancyGrid | None

    def __init__(self) -> None:
        super().__init__()
        # On the object: an attribute of the class would hide the module that a scene puts in its place.
        self.occupancy = None

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by role, each in exactly one group; a recipe gives each group a learning rate.

        Names: "encoding" (grids, hash tables), "networks" (MLP heads, the variance of a signed distance),
        "background".
        """

    @abstractmethod
    def render(
        self,
        origins: Tensor,
        directions: Tensor,
        *,
        jitter: bool = False,
        normals: bool = False,
        roughness: bool = False,
        light: Light | None = None,
        backdrop: Tensor | None = None,
        step: int | None = None,
    ) -> Render:
        """Composite the scene along rays.

        What it draws comes from torch's global CPU generator, a number a ray whether or not the ray
        meets anything, so that a ray's draw does not depend on others.

        Args:
            origins: where rays start, world units. # [batch, height, width, 3]
            directions: unit vectors. # [batch, height, width, 3]
            jitter: displace each ray's samples by one random fraction of their spacing (for training).
            normals: also composite normals, and what is penalised about them.
            roughness: also measure how fast normals change in space (needs normals).
            light: lights the surface; None: albedo.
            backdrop: colour behind the object, in place of the scene's own background. # [batch, 3]
            step: step of the run, for what comes in progressively; None: everything is in (a finished scene).
        """

    @abstractmethod
    def inside(self, points: Tensor) -> Tensor:
        """Positive inside of the surface, negative outside; a mesh is cut out where it is 0.

        Args:
            points: world units. # [count, 3]

        Returns:
            [count]
        """

    @abstractmethod
    def colour(self, points: Tensor) -> Tensor:
        """Albedo, RGB in [0, 1]. [count, 3] -> [count, 3]."""

    def occupied_density(self, points: Tensor) -> Tensor:
        """The density that the occupancy grid keeps track of. [count, 3] -> [count]."""
        raise TypeError(f"{type(self).__name__} keeps no occupancy grid")
