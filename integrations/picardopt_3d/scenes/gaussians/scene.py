"""3D Gaussians as a scene (arXiv 2308.04079), whose strategy adds and removes Gaussians while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from picardopt import Carry, Restructure
from picardopt_3d.cameras import Cameras
from picardopt_3d.problem import Losses
from picardopt_3d.scenes.gaussians.config import GaussiansConfig
from picardopt_3d.scenes.gaussians.density import surface_of
from picardopt_3d.scenes.gaussians.normals import normals_of_depth
from picardopt_3d.scenes.gaussians.rasterize import chosen, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats
from picardopt_3d.scenes.gaussians.start import in_ball, on_surface
from picardopt_3d.scenes.gaussians.statistics import RunningStatistics, Statistics
from picardopt_3d.scenes.gaussians.strategy import apply, densifies, due
from picardopt_3d.scenes.scene import Scene, Surface
from picardopt_3d.scenes.views import Light, Render

_FAINT = -3.0
"""Opacity logit below which a Gaussian does not count for the size of the surface."""
_FAR_OFF = 3.0
"""Gaussians that reach farther than the median one, times this, do not count for it either."""


class Gaussians(Scene):
    """3D Gaussians that are trained, with the statistics that decide which are split and which are removed.

    Args:
        config: The configuration.
        splats: The Gaussians to start with; None: random ones in a ball, from torch's global CPU generator.
    """

    config: GaussiansConfig
    means: nn.Parameter
    log_scales: nn.Parameter
    rotations: nn.Parameter
    opacity_logits: nn.Parameter
    colours: nn.Parameter
    harmonics: nn.Parameter

    def __init__(self, config: GaussiansConfig, splats: Splats | None = None) -> None:
        super().__init__()
        self.config = config
        splats = in_ball(config) if splats is None else splats
        for name, value in splats._asdict().items():
            if name != "harmonics" or config.degree:
                setattr(self, name, nn.Parameter(value))
        self.statistics = RunningStatistics(len(splats.means))

    @property
    def count(self) -> int:
        """The number of Gaussians."""
        return len(self.means)

    def splats(self) -> Splats:
        """Returns the tensors, in the graph of the parameters."""
        harmonics = self.harmonics if self.config.degree else self.means.new_zeros(self.count, 0, 3)
        return Splats(
            self.means,
            self.log_scales,
            self.rotations,
            self.opacity_logits,
            self.colours,
            harmonics,
        )

    def prepare(self) -> None:
        """Refuses a rasterizer that cannot be used here: before step 0, where all processes end in one line.

        Raises:
            ValueError: See `rasterize`.
        """
        chosen(self.config.rasterizer, self.device)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns each tensor of `Splats` as a group of its own; "harmonics" is empty for degree 0."""
        trained = self._trained()
        return {name: [trained[name]] if name in trained else [] for name in Splats._fields}

    def _trained(self) -> dict[str, nn.Parameter]:
        """Returns the parameters by the field of `Splats`."""
        names = (name for name in Splats._fields if name != "harmonics" or self.config.degree)
        return {name: getattr(self, name) for name in names}

    def render(
        self,
        cameras: Cameras,
        size: int | tuple[int, int],
        *,
        jitter: bool = False,
        normals: bool = False,
        normal_smoothness: bool = False,
        light: Light | None = None,
        background: Tensor | None = None,
        step: int | None = None,
    ) -> Render:
        """Renders the Gaussians; see `Scene.render`. Nothing is drawn at random, and `step` changes nothing.

        Normals are those of the surface that the depths of neighbouring pixels describe.

        Raises:
            ValueError: A light or the smoothness of normals in space is asked for, which Gaussians do not have.
        """
        if light is not None or normal_smoothness:
            raise ValueError(
                "3D Gaussians have no normals in space: leave lights and weights.normal_smoothness_3d at 0"
            )
        height, width = (size, size) if isinstance(size, int) else size
        drawn = rasterize(
            self.splats(),
            cameras,
            height,
            width,
            degree=self.config.degree,
            rasterizer=self.config.rasterizer,
        )
        if background is None:
            background = self.means.new_tensor([self.config.background])
        rgb = drawn.colour + (1 - drawn.opacity) * background[:, :, None, None]
        return Render(
            rgb=rgb,
            opacity=drawn.opacity,
            depth=drawn.depth,
            normal=normals_of_depth(drawn.depth, drawn.opacity, cameras) if normals else None,
            drawn=drawn,
        )

    def measure(self, step: int, *renders: Render) -> dict[str, Tensor]:
        """Returns the statistics of a step's views by the fields of `Statistics`; `backward` fills in the gradients.

        Nothing once the strategy has ended: no later step reads them.
        """
        strategy = self.config.strategy
        if strategy is None or step + 1 >= strategy.stop:
            return {}
        found = Statistics.zeros(self.count, self.device)
        for render in renders:
            _measure(render, found)
        return found._asdict()

    def carry(self) -> Carry | None:
        """Returns the statistics, to which each step's measurements are added, if it made any."""
        if self.config.strategy is None:
            return None

        def update(returned: Losses) -> None:
            if returned.aux:
                self.statistics.present().add_(Statistics(**returned.aux))

        return Carry(self.statistics, update)

    def restructure(self, optimizers: Sequence[Optimizer]) -> Restructure | None:
        """Returns when and how Gaussians are added and removed."""
        strategy = self.config.strategy
        if strategy is None:
            return None
        change = _Change(self, self.statistics, tuple(optimizers))
        return Restructure(change, lambda step: due(strategy, step), across=self.config.across)

    def counts(self) -> dict[str, int]:
        """Returns the number of Gaussians."""
        return {"Gaussians": self.count}

    def surface(self) -> Surface:
        """Returns the surface on which the density has a fixed value; Gaussians far off from the others are cut off."""
        scales = self.log_scales.detach().exp().amax(1)
        reach = (self.means.detach().norm(dim=1) + 3 * scales)[self.opacity_logits > _FAINT]
        if not len(reach):
            return surface_of(self.splats(), self.config.radius)
        return surface_of(self.splats(), float(reach.max().clamp(max=_FAR_OFF * reach.median())))

    @classmethod
    def converts(cls, other: type[Scene]) -> bool:
        """Returns whether scenes of the other kind have a surface."""
        return other.surface is not Scene.surface

    @classmethod
    def from_scene(cls, config: GaussiansConfig, other: Scene) -> Self:
        """Starts with Gaussians on the surface of another scene, in its colours.

        Raises:
            ValueError: The other scene has no surface.
        """
        return cls(config, on_surface(config, other.surface()))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads another number of Gaussians too; optimizers keep the same parameters, in their new size.

        Raises:
            RuntimeError: Names or shapes do not fit. Nothing is loaded then.
        """
        rows = state_dict["means"].shape[:1] if "means" in state_dict else ()
        count = rows[0] if rows else self.count
        own, resized = self.state_dict(), count != self.count
        wrong = [f"{name} is missing" for name in own.keys() - state_dict if strict or resized]
        wrong += [f"{name} is unknown" for name in state_dict.keys() - own if strict]
        for name in own.keys() & state_dict:
            found, expected = tuple(state_dict[name].shape), (count, *own[name].shape[1:])
            if found != expected:
                wrong.append(f"{name} has shape {found} instead of {expected}")
        if wrong:
            raise RuntimeError(
                f"the state is not one of these Gaussians: {', '.join(sorted(wrong))}"
            )
        if resized:
            for parameter in self._trained().values():
                parameter.data = parameter.data.new_zeros(count, *parameter.shape[1:])
                parameter.grad = None
            self.statistics.reset(count)
        return super().load_state_dict(state_dict, strict, assign)


@dataclass(frozen=True, eq=False)
class _Change:
    """Adds and removes Gaussians after a step.

    Attributes:
        scene: Holds the parameters.
        statistics: Their statistics.
        optimizers: Those of the scene.
    """

    scene: Gaussians
    statistics: RunningStatistics
    optimizers: tuple[Optimizer, ...]

    def __call__(self, step: int) -> Tensor:
        """Changes scene, statistics and optimizers; returns the old row of each new one, `[count]`."""
        strategy = self.scene.config.strategy
        assert strategy is not None
        parameters = self.scene._trained()
        parents = apply(parameters, self.optimizers, self.statistics.present(), strategy, step)
        for name, parameter in parameters.items():
            setattr(self.scene, name, parameter)
        if densifies(strategy, step):
            self.statistics.reset(len(parents))
        return parents


def _measure(render: Render, found: Statistics) -> None:
    """Adds what a batch of views shows, now and, its gradients, in `backward`.

    As in gsplat, a gradient is multiplied by the number of views: the loss is a mean over them.
    """
    drawn, (height, width) = render.drawn, render.opacity.shape[-2:]
    edges = drawn.means2d.new_tensor([width / 2, height / 2]) * len(drawn.means2d)

    def fill(gradient: Tensor) -> None:
        found.gradients.add_((gradient.detach() * edges).norm(dim=-1).sum(0))

    if drawn.means2d.requires_grad:
        drawn.means2d.register_hook(fill)
    with torch.no_grad():
        radii = drawn.radii.amax(0).to(found.radii) / max(height, width)
        nothing = torch.zeros_like(found.gradients)
        found.add_(Statistics(nothing, (drawn.radii > 0).sum(0), radii))
