"""The folder of a run: the name of every file, written here and nowhere else.

    config.yaml  input.png                    the options; the picture that the run is made from, prepared
    stages/1-NAME/checkpoint.pt               the last committed step
    stages/1-NAME/scene.safetensors           the scene alone
    stages/1-NAME/record.json                 losses, strides, drift errors, seconds so far
    stages/1-NAME/progress/step_00100.png     pictures
    stages/1-NAME/contact_sheet.png           six views, where another stage comes after
    report.json  contact_sheet.png  turntable.mp4  strides.png  tensorboard/  wandb/
    viewer.html                               the object to turn, its views and figures, in one file
    plan.json                                 of `picardopt plan`, before the run

Earlier versions kept the checkpoint, the scene and the pictures of their only stage in the run's folder itself; such a
folder is read, and gone on with, as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PLAN = "plan.json"
"""What `picardopt plan` leaves in a folder: a run may follow there."""
_CHECKPOINT = "checkpoint.pt"
_SCENE = "scene.safetensors"
_STAGES = "stages"


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The last committed step: scene, guidance, optimizers, record."""
        return self.path / _CHECKPOINT

    @property
    def scene(self) -> Path:
        """The scene alone."""
        return self.path / _SCENE

    @property
    def record(self) -> Path:
        """What has happened so far, without tensors."""
        return self.path / "record.json"

    @property
    def sheet(self) -> Path:
        """Six views in one picture, of a stage that others come after."""
        return self.path / "contact_sheet.png"

    def picture(self, step: int) -> Path:
        """The progress picture after a step, counted from 0."""
        return self.path / "progress" / f"step_{step + 1:05d}.png"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: The folder, which `--out` names.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The options, as YAML."""
        return self.path / "config.yaml"

    @property
    def input(self) -> Path:
        """The picture that the run is made from, prepared."""
        return self.path / "input.png"

    @property
    def report(self) -> Path:
        """Figures of the finished run."""
        return self.path / "report.json"

    @property
    def sheet(self) -> Path:
        """Six views in one picture."""
        return self.path / "contact_sheet.png"

    @property
    def film(self) -> Path:
        """One turn of the object."""
        return self.path / "turntable.mp4"

    @property
    def plot(self) -> Path:
        """Strides, residuals, tolerances and drift errors."""
        return self.path / "strides.png"

    @property
    def page(self) -> Path:
        """The object to turn in a browser, with its views and figures."""
        return self.path / "viewer.html"

    @property
    def tensorboard(self) -> Path:
        """Events for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """What Weights & Biases keeps of the run."""
        return self.path / "wandb"

    @property
    def plan(self) -> Path:
        """What `picardopt plan` found; a run leaves it alone."""
        return self.path / PLAN

    @property
    def own(self) -> tuple[Path, ...]:
        """All files and folders that a run writes, and that --overwrite replaces; also those of earlier versions."""
        own = (self.config, self.input, self.report, self.sheet, self.film, self.plot, self.page)
        earlier = StageFolder(self.path)
        of_stage = (earlier.checkpoint, earlier.scene, earlier.record, earlier.picture(0).parent)
        return (*own, self.tensorboard, self.wandb, self.path / _STAGES, *of_stage)

    def stage(self, index: int, name: str) -> StageFolder:
        """Returns the folder of a stage.

        Args:
            index: Of the stage, from 0.
            name: As the recipe calls it.
        """
        if index == 0 and (self.path / _CHECKPOINT).exists():
            return StageFolder(self.path)
        return StageFolder(self.path / _STAGES / f"{index + 1}-{name}")

    def begun(self) -> list[StageFolder]:
        """Returns the stages that have a checkpoint, in order."""
        later = (self.path / _STAGES).glob(f"*/{_CHECKPOINT}")
        order = sorted(later, key=lambda path: int(path.parent.name.partition("-")[0]))
        first = [self.path / _CHECKPOINT] if (self.path / _CHECKPOINT).exists() else []
        return [StageFolder(path.parent) for path in [*first, *order]]

    @property
    def scene(self) -> Path:
        """The scene of the last stage that has one.

        Raises:
            FileNotFoundError: There is none.
        """
        stages = [stage.scene for stage in self.begun() if stage.scene.is_file()]
        if stages:
            return stages[-1]
        if (self.path / _SCENE).is_file():  # copied without its checkpoint
            return self.path / _SCENE
        raise FileNotFoundError(
            f"{self.path} is no finished run: it has no {_SCENE}; give the folder that --out named"
        )
