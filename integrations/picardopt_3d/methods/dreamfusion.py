"""DreamFusion (arXiv 2209.14988) at the size of the shipped guidance: 32 pixels, one CPU thread.

What is kept of the recipe: a density blob, random cameras, score distillation, Adam with betas
(0.9, 0.99) and eps 1e-15. What the size changes: a voxel grid instead of a network (so the learning
rate is larger), and ambient light only (the shipped model's objects are matt and lit from one side,
which a field without view dependence can show). The sparsity and orientation losses are there for
other guidance; with the shipped one nothing floats, and they are off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cameras import CameraConfig, random_cameras
from ..domain import BACKGROUND
from ..guidance import Guidance, SdsConfig, TimestepSchedule
from ..scenes import FieldConfig, RadianceField


@dataclass(frozen=True)
class DreamFusionConfig:
    """The recipe's numbers.

    Args:
        batch: views a step.
        size: pixels along each edge of a view.
        learning_rate: Adam's.
        sds: classifier-free guidance and the weighting of noise levels.
        timesteps: range of diffusion times, and how it moves.
        sparsity: weight of the opacity loss sqrt(opacity^2 + 0.01), which clears floaters.
        orientation: weight of the penalty on visible normals that face away; 0 leaves it out (it
            doubles the cost of a view).
        cameras: where views are taken from.
        field: the scene's sizes.
    """

    batch: int = 4
    size: int = 32
    learning_rate: float = 0.04
    sds: SdsConfig = field(default_factory=lambda: SdsConfig(guidance_scale=3.0))
    timesteps: TimestepSchedule = field(default_factory=TimestepSchedule)
    sparsity: float = 0.0
    orientation: float = 0.0
    cameras: CameraConfig = field(default_factory=CameraConfig)
    field: FieldConfig = field(default_factory=lambda: FieldConfig(background=BACKGROUND))

    def __post_init__(self) -> None:
        """Refuse numbers that make no step, by name, with the remedy."""
        for name in ("batch", "size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        for name in ("sparsity", "orientation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or a positive weight")


class DreamFusion:
    """A scene, its optimizer and the loss of each step.

    Args:
        config: the numbers.
        guidance: judges rendered views.
        prompt: what to make.
        steps: length of the run, for what is annealed.
        device: where the scene lives.
    """

    def __init__(
        self,
        config: DreamFusionConfig,
        guidance: Guidance,
        prompt: str,
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.guidance, self.steps, self.device = config, guidance, steps, device
        self.prompt = guidance.encode(prompt)
        self.scene = RadianceField(config.field).to(device)

    def optimizer(self) -> torch.optim.Adam:
        """The recipe's Adam over the scene."""
        return torch.optim.Adam(
            self.scene.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.99), eps=1e-15
        )

    def loss(self, step: int) -> Tensor:
        """The loss of one step: a function of the parameters, the step and its randomness."""
        config = self.config
        cameras = random_cameras(config.batch, config.cameras, self.device)
        render = self.scene.render(
            *cameras.rays(config.size, config.size), jitter=True, normals=config.orientation > 0
        )
        timestep_range = config.timesteps.at(step, self.steps)
        loss = self.guidance(render.rgb, self.prompt, cameras, timestep_range)
        if config.sparsity > 0:
            loss = loss + config.sparsity * (render.opacity.square() + 0.01).sqrt().mean()
        if render.back_facing is not None:
            loss = loss + config.orientation * render.back_facing
        return loss
