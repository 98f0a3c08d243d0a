"""The configurations of scenes that are triangles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from picardopt_3d.scenes.hash_grid import HashConfig
from picardopt_3d.scenes.networks import check_background

Rasterizer = Literal["torch", "nvdiffrast"]
"""What draws triangles: plain torch (any device) or nvdiffrast (CUDA).

nvdiffrast's gradients do not repeat, so that no run with it is exact; nor do they know the silhouettes of faces smaller
than a pixel."""

Trained = Literal["all", "shape", "colour"]
"""What is trained of a mesh; the rest is kept and drawn."""


@dataclass(frozen=True)
class TetrahedralConfig:
    """The configuration of a tetrahedral grid with a signed distance at its vertices (DMTet, arXiv 2111.04276).

    Attributes:
        resolution: Cells along each edge of the cube. There are two vertices per cell, at a corner and in its middle:
            the table of tetrahedra that DMTet calls 128 has as many as 52 cells along an edge, the default.
        radius: Half the edge of the cube, world units; a grid made from another scene has a smaller cube around it.
        deform: Whether the vertices of the grid can move, each by at most a quarter of a cell along each axis.
        trained: What is trained: the shape, the colours, or both.
        encoding: The hash encoding of the colours.
        width: Width of the hidden layers of the colours' network.
        depth: Number of its hidden layers.
        background: "solid", or "neural" (a small network of the ray's direction).
        background_colour: Colour of a "solid" background, RGB in [0, 1].
        rasterizer: What draws the triangles.
    """

    resolution: int = 52
    radius: float = 2.0
    deform: bool = True
    trained: Trained = "all"
    encoding: HashConfig = field(default_factory=HashConfig)
    width: int = 64
    depth: int = 1
    background: Literal["solid", "neural"] = "neural"
    background_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rasterizer: Rasterizer = "torch"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        for name, least in (("resolution", 2), ("width", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: give at least {least}")
        if not self.radius > 0:
            raise ValueError(f"radius={self.radius!r}: give a positive number")
        check_mesh(self.trained, self.rasterizer)
        check_background(self.background, self.background_colour)


@dataclass(frozen=True)
class TexturedMeshConfig:
    """The configuration of a mesh with a texture, which is made from another scene.

    Attributes:
        resolution: Samples of the other scene along each edge of the cube around it, where its surface is extracted.
        faces: Most triangles; a surface with more is simplified.
        texture: Pixels along each edge of the texture.
        level: Value of the other scene's level set at the surface; None: the one whose outlines are those of its views.
        view_pixels: Pixels along each edge of the other scene's views that outlines and colours are taken from: as many
            as the scene was trained with, at which it looks as it should.
        view_distance: Distance of these views' cameras from the origin, world units: best that of the training, for the
            same reason; None: so near that they just see all of it.
        view_fov: Their vertical field of view, degrees.
        samples: Points along each edge of a pixel, whose mean it shows: textures have no smaller versions to look up.
        trained: What is trained: the shape (offsets of the vertices), the colours (the texture), or both.
        background: Colour of the background, RGB in [0, 1].
        rasterizer: What draws the triangles.
    """

    resolution: int = 128
    faces: int = 50_000
    texture: int = 1024
    level: float | None = None
    view_pixels: int = 256
    view_distance: float | None = None
    view_fov: float = 42.5
    samples: int = 1
    trained: Trained = "colour"
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rasterizer: Rasterizer = "torch"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        for name, least in (
            ("resolution", 8),
            ("faces", 4),
            ("texture", 16),
            ("view_pixels", 16),
            ("samples", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: give at least {least}")
        if self.view_distance is not None and not self.view_distance > 0:
            raise ValueError(f"view_distance={self.view_distance!r}: give a positive number")
        if not 0 < self.view_fov < 180:
            raise ValueError(f"view_fov={self.view_fov!r}: give degrees between 0 and 180")
        check_mesh(self.trained, self.rasterizer)
        check_background("solid", self.background)


def check_mesh(trained: str, rasterizer: str) -> None:
    """Checks the names that both configurations share.

    Raises:
        ValueError: A name is unknown.
    """
    if trained not in get_args(Trained):
        raise ValueError(f"trained={trained!r}: give one of {', '.join(get_args(Trained))}")
    if rasterizer not in get_args(Rasterizer):
        raise ValueError(
            f"rasterizer={rasterizer!r}: give one of {', '.join(get_args(Rasterizer))}"
        )
