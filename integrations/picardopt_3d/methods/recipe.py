"""The configuration of a recipe: frozen dataclasses, one for each stage, which build the `Stage`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

import torch

from picardopt_3d.cameras import CameraConfig
from picardopt_3d.guidance import DenoiseConfig, Guidance, SdsConfig, TimestepSchedule, VsdConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.images import ReferenceImage
from picardopt_3d.methods.optim import OptimizerConfig
from picardopt_3d.methods.schedules import Milestones, check_milestones, current
from picardopt_3d.picard import PicardConfig
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.scenes import Scene, SceneConfig, caution_of

if TYPE_CHECKING:
    from picardopt_3d.methods.stage import Stage


class NamedStage(NamedTuple):
    """One stage of a recipe.

    Attributes:
        name: Name of the stage in folders and options.
        config: Its configuration.
    """

    name: str
    config: StageConfig


class RecipeConfig:
    """The configuration of a recipe; with several stages, a dataclass with one field for each of them."""

    def stages(self) -> tuple[NamedStage, ...]:
        """Returns the stages in order; each starts from the scene of the previous one."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))  # type: ignore[arg-type]
        return tuple(NamedStage(*pair) for pair in values if isinstance(pair[1], StageConfig))


@dataclass(frozen=True, kw_only=True)
class StageConfig(OptimizerConfig, RecipeConfig, ABC):
    """The configuration that all stages share; by itself it is a recipe with one stage.

    Attributes:
        steps: Optimizer steps.
        batch: Views per step: a number, or (first step, number) pairs.
        pixels: Pixels along each edge of a view: a number, or (first step, number) pairs.
        scene: Kind and configuration of the scene.
        guidance: The score model, its prompts, and the loss that uses its scores.
        sds: Options of score distillation.
        vsd: Options of variational score distillation.
        denoise: Options of image-to-image denoising.
        timesteps: Range of noise levels, and how it changes during the run.
        cameras: Distribution of the training cameras.
        picard: Window, tolerance and predictor, unless options of the command override them.
    """

    steps: int
    batch: Milestones
    pixels: Milestones
    scene: SceneConfig
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    vsd: VsdConfig = field(default_factory=VsdConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)
    timesteps: TimestepSchedule = field(default_factory=TimestepSchedule)
    cameras: CameraConfig = field(default_factory=CameraConfig)
    picard: PicardConfig = field(default_factory=PicardConfig)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
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
    def caution(self) -> str | None:
        """What a user must know of a run with this configuration, in one line; None: nothing."""
        loss = self.vsd.caution if self.guidance.loss == "vsd" else None
        return "; ".join(filter(None, [loss, caution_of(self.scene)])) or None

    @property
    def final_pixels(self) -> int:
        """Pixels along each edge of the last step's views."""
        return current(self.pixels, self.steps - 1)

    @abstractmethod
    def build(self, context: Context, previous: Scene | None = None) -> Stage:
        """Builds the stage; random numbers come from torch's global CPU generator.

        Args:
            context: Guidance, prompt and device of the run.
            previous: The scene of the previous stage; None: a new scene.
        """


@dataclass(frozen=True)
class Context:
    """What a stage needs besides its configuration.

    Attributes:
        guidance: The guidance, a loss on rendered views.
        prompt: The prompt of the run.
        device: Device of the scene.
        image: The reference picture, for recipes that take one.
    """

    guidance: Guidance
    prompt: TextPrompt | ImagePrompt
    device: torch.device
    image: ReferenceImage | None = None


def stage_seed(seed: int, index: int) -> int:
    """Returns the seed of a stage: the run's for the first one, a hash for others so that their noise differs.

    Args:
        seed: The seed of the run.
        index: Index of the stage, from 0.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"stage {index} of seed {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: a checkpoint keeps it as a signed integer
