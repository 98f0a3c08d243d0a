"""What a recipe is told: its numbers as frozen configurations, and its stages, each of which builds a `Stage`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

import torch

from picardopt_3d.cameras import CameraConfig
from picardopt_3d.guidance import Guidance, SdsConfig, TimestepSchedule, VsdConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.images import ReferenceImage
from picardopt_3d.methods.optim import OptimizerConfig
from picardopt_3d.methods.schedules import Milestones, check_milestones, current
from picardopt_3d.picard import PicardConfig
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.scenes import Scene, SceneConfig

if TYPE_CHECKING:
    from picardopt_3d.methods.stage import Stage


class NamedStage(NamedTuple):
    """One stage of a recipe.

    Attributes:
        name: Of the stage, as folders and options call it.
        config: Its numbers.
    """

    name: str
    config: StageConfig


class RecipeConfig:
    """The numbers of a recipe, whatever its stages; a dataclass with one field for each of several stages."""

    def stages(self) -> tuple[NamedStage, ...]:
        """Returns the stages in order; each starts with the scene that the one before has made."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))  # type: ignore[arg-type]
        return tuple(NamedStage(*pair) for pair in values if isinstance(pair[1], StageConfig))


@dataclass(frozen=True, kw_only=True)
class StageConfig(OptimizerConfig, RecipeConfig, ABC):
    """The numbers that every stage has; by itself it is a recipe of one stage.

    Attributes:
        steps: Optimizer steps.
        batch: Views a step, a number or (first step, number) pairs.
        pixels: Pixels along each edge of a view, likewise.
        scene: What is trained, and its sizes.
        guidance: The score model, what it is told, and which loss it is used in.
        sds: Numbers of score distillation.
        vsd: Numbers of variational score distillation.
        timesteps: Range of diffusion times, and how it moves.
        cameras: Where views are taken from.
        picard: How the run goes ahead of itself unless the command says otherwise.
    """

    steps: int
    batch: Milestones
    pixels: Milestones
    scene: SceneConfig
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    vsd: VsdConfig = field(default_factory=VsdConfig)
    timesteps: TimestepSchedule = field(default_factory=TimestepSchedule)
    cameras: CameraConfig = field(default_factory=CameraConfig)
    picard: PicardConfig = field(default_factory=PicardConfig)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: One of them makes no step; the message names it.
        """
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a whole number of at least 1")
        check_milestones("batch", self.batch)
        check_milestones("pixels", self.pixels)

    def stages(self) -> tuple[NamedStage, ...]:
        """Returns this one stage."""
        return (NamedStage("stage", self),)

    @property
    def final_pixels(self) -> int:
        """Pixels along each edge of the last step's views."""
        return current(self.pixels, self.steps - 1)

    @abstractmethod
    def build(self, context: Context, previous: Scene | None = None) -> Stage:
        """Builds the stage; what it draws comes from torch's global CPU generator.

        Args:
            context: What its numbers are used on.
            previous: The scene that the stage before has made; None: a new scene.
        """


@dataclass(frozen=True)
class Context:
    """What a stage is given besides its numbers.

    Attributes:
        guidance: Judges rendered views.
        prompt: What to make.
        device: Where the scene lives.
        image: The picture that it is made from, of recipes that take one.
    """

    guidance: Guidance
    prompt: TextPrompt | ImagePrompt
    device: torch.device
    image: ReferenceImage | None = None


def stage_seed(seed: int, index: int) -> int:
    """Returns the seed of a stage: the run's for the first one, for others a hash, or they would see the same noise.

    Args:
        seed: The run's.
        index: Of the stage, from 0.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"stage {index} of seed {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: a checkpoint keeps it as a signed integer
