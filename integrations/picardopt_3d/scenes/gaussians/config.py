"""The configuration of 3D Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from picardopt_3d.scenes.views import WHITE

Rasterizer = Literal["auto", "torch", "gsplat"]


@dataclass(frozen=True)
class StrategyConfig:
    """When and how Gaussians are added and removed (3D Gaussian Splatting, section 5.2).

    Attributes:
        start: Steps taken before Gaussians can be added and removed.
        stop: Steps taken from which on neither the number nor the opacities of Gaussians are changed; 0: they never
            are. (In a file `strategy: null` says so, too.)
        every: Gaussians are added and removed after each so many steps of the run.
        gradient: Gaussians are duplicated or split where the mean length of the gradient of their centre on the screen
            (whose edges are at -1 and 1) is at least this.
        split_scale: Largest standard deviation, world units, up to which Gaussians are duplicated; larger ones are
            split.
        least_opacity: Gaussians below this opacity are removed.
        largest_scale: Gaussians with a larger standard deviation, world units, are removed; None: none are.
        largest_radius: Gaussians that were seen with a larger radius since the last change, as a share of the picture's
            edge, are removed; None: none are. In the published code this never happens, because the radii are reset
            just before they are looked at: None reproduces this.
        reset_every: The opacities of Gaussians are reset after each so many steps of the run; 0: never.
        reset_opacity: Opacity that a reset leaves a Gaussian at most.
        most: No Gaussians are added beyond this number; those with the largest gradients come first.
    """

    start: int = 100
    stop: int = 15_000
    every: int = 100
    gradient: float = 0.0002
    split_scale: float = 0.01
    least_opacity: float = 0.005
    largest_scale: float | None = None
    largest_radius: float | None = None
    reset_every: int = 0
    reset_opacity: float = 0.01
    most: int = 1_000_000

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        for name, least in (
            ("start", 0),
            ("stop", 0),
            ("every", 1),
            ("reset_every", 0),
            ("most", 1),
        ):
            _check_whole(name, getattr(self, name), least)
        for name in ("gradient", "split_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number of at least 0")
        for name in ("largest_scale", "largest_radius"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number, or None")
        if not 0 <= self.least_opacity < 1:
            raise ValueError(
                f"least_opacity={self.least_opacity!r}: give a number from 0 to below 1"
            )
        if not 0 < self.reset_opacity < 1:
            raise ValueError(f"reset_opacity={self.reset_opacity!r}: give a number between 0 and 1")
        if self.reset_every and self.reset_opacity < self.least_opacity:
            raise ValueError(
                f"reset_opacity={self.reset_opacity!r}: give at least least_opacity={self.least_opacity!r}, or every "
                "Gaussian is removed after a reset"
            )


@dataclass(frozen=True)
class GaussiansConfig:
    """The configuration of 3D Gaussians.

    Attributes:
        count: Gaussians at the start.
        radius: Radius of the ball in which Gaussians start, world units.
        opacity: Opacity of Gaussians at the start.
        degree: Degree of the spherical harmonics of the Gaussians' colours, 0 (the same from all sides) to 3.
        background: Colour behind the Gaussians, RGB in [0, 1].
        strategy: When and how Gaussians are added and removed; None: their number stays.
        across: Whether windows run across the steps that add and remove Gaussians, as in the paper (see
            `picardopt.Restructure`).
        rasterizer: "gsplat" (CUDA), "torch" (any device), or "auto": gsplat on CUDA if it is installed.
    """

    count: int = 5000
    radius: float = 0.5
    opacity: float = 0.1
    degree: int = 0
    background: tuple[float, float, float] = WHITE
    strategy: StrategyConfig | None = field(default_factory=StrategyConfig)
    across: bool = False
    rasterizer: Rasterizer = "auto"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        _check_whole("count", self.count, 1)
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius!r}: give a positive, finite number")
        if not 0 < self.opacity < 1:
            raise ValueError(f"opacity={self.opacity!r}: give a number between 0 and 1")
        if not isinstance(self.degree, int) or not 0 <= self.degree <= 3:
            raise ValueError(f"degree={self.degree!r}: give 0, 1, 2 or 3")
        if len(self.background) != 3 or not all(0 <= value <= 1 for value in self.background):
            raise ValueError(f"background={self.background!r}: give red, green and blue in [0, 1]")
        if self.rasterizer not in get_args(Rasterizer):
            raise ValueError(f"rasterizer={self.rasterizer!r}: give 'auto', 'torch' or 'gsplat'")


def _check_whole(name: str, value: int, least: int) -> None:
    """Checks a whole number.

    Raises:
        ValueError: It is below `least` or not whole.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
