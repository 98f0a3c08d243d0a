"""The training loop of all shipped models: averaged weights, checkpoints, resuming, budgets and progress."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from picardopt_3d.cameras import CameraConfig
from picardopt_3d.compat import precision
from picardopt_3d.io import replacing
from picardopt_3d.training.data import WIDE_CAMERAS, Views
from picardopt_3d.training.sheets import save_loss_curve
from picardopt_3d.world import Subject

_HOW = {
    "out",
    "views_file",
    "stop_after",
    "checkpoint_minutes",
    "minutes",
    "sample_steps",
    "device",
}
"""Options that may differ between a run and its checkpoint, because they do not change what is learned."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options of every training.

    Attributes:
        out: Folder of all files that are written.
        start: Folder of a trained model (a `pipeline` folder) to start from; None: random initial weights.
        views_file: File of the rendered views, which runs with the same views can share; None: a file in `out`.
        images: Total number of training images, over which the learning rate decays.
        minutes: If positive, an upper limit of the training time in minutes. The learning rate then decays with
            whichever of the two budgets is closer to its end, and the run depends on the machine.
        stop_after: If positive, stop (with a checkpoint) after this many optimizer steps of this process.
        batch: Images per step.
        lr: Peak learning rate.
        warmup: Steps until the peak learning rate.
        weight_decay: Weight decay of AdamW.
        ema: Largest decay of the average of the weights.
        views: Rendered views per shape.
        seed: Seed of the weights, the views and the batches.
        checkpoint_minutes: Minutes between checkpoints.
        sample_steps: Denoising steps of the sample sheet.
        device: Device of the training.
        autocast: Whether to compute in bfloat16 where torch considers it safe, which is faster on accelerators.
    """

    out: Path
    start: Path | None = None
    views_file: Path | None = None
    images: int = 300_000
    minutes: float = 0.0
    stop_after: int = 0
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 1e-3
    ema: float = 0.999
    views: int = 1536
    seed: int = 0
    checkpoint_minutes: float = 4.0
    sample_steps: int = 50
    device: Literal["cpu", "cuda"] = "cpu"
    autocast: bool = False


def load_views(
    config: LoopConfig,
    size: int,
    cameras: CameraConfig = WIDE_CAMERAS,
    subjects: Sequence[Subject] | None = None,
) -> Views:
    """Returns the training views, loaded from a file or rendered.

    Args:
        config: Options of the training.
        size: Pixels along a side.
        cameras: Distribution of the cameras.
        subjects: The subjects to draw from; by default all but the held-out ones.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.views_file or config.out / "views.pt"
    return Views.cached(path, config.views, size, config.seed, cameras, subjects, config.device)


class Trainer(ABC):
    """A training run, with all that a checkpoint holds.

    A subclass builds its parts from `config`, then calls this constructor.

    Args:
        config: Options of the training.
        modules: The modules to train, by name.
    """

    def __init__(self, config: LoopConfig, modules: Mapping[str, nn.Module]) -> None:
        self.config, self.modules = config, dict(modules)
        if config.device == "cuda":
            torch.backends.cudnn.benchmark = True
        for name, module in self.modules.items():
            if config.start is not None:
                _take_weights(module, config.start, name)
            module.to(config.device).train()
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=config.device == "cuda",
        )
        self.ema = EMAModel(self.parameters, decay=config.ema, foreach=True)
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.seconds = 0.0
        self._losses: list[float] = []
        self._fresh: list[Tensor] = []  # losses that are still on the device

    @abstractmethod
    def loss(self) -> Tensor:
        """Returns the loss of a new batch; random numbers come from `self.generator` alone."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Writes the model with its current weights, in half precision."""

    @abstractmethod
    def sample_sheet(self, path: Path) -> None:
        """Writes a picture of samples with the current weights."""

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        self._losses += torch.stack(self._fresh).tolist() if self._fresh else []
        self._fresh = []
        return self._losses

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return len(self._losses) + len(self._fresh)

    @property
    def images(self) -> int:
        """Number of training images so far."""
        return self.steps * self.config.batch

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        spent = self.images / self.config.images
        if self.config.minutes > 0:
            spent = max(spent, self.seconds / (60 * self.config.minutes))
        return min(1.0, spent)

    def step(self) -> None:
        """Takes one optimizer step."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / config.warmup)
        lr = config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(config.device, torch.bfloat16, enabled=config.autocast):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        self._fresh.append(loss.detach().float())

    def save(self) -> None:
        """Writes the checkpoint, atomically."""
        state = {
            "config": _fingerprint(self.config),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": self.seconds,
        }
        with replacing(self.config.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> bool:
        """Loads the checkpoint and returns True, or returns False if there is none.

        Raises:
            ValueError: The checkpoint belongs to a run with other settings.
        """
        path = self.config.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location=self.config.device)
        if state["config"] != _fingerprint(self.config):
            raise ValueError(
                f"out={str(self.config.out)!r} holds a checkpoint of a run with other settings "
                f"({state['config']}): give another --out, or delete {path}"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"].cpu())
        self._losses, self._fresh = state["losses"].tolist(), []
        self.seconds = state["seconds"]
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Uses the averaged weights, in evaluation mode, within a block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        for module in self.modules.values():
            module.eval()
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
            for module in self.modules.values():
                module.train()

    def export(self) -> Path:
        """Writes the averaged weights as a model folder, with samples and the loss curve beside it."""
        out, losses = self.config.out, self.losses
        with self.averaged(), torch.no_grad():
            self.save_model(out / "pipeline")
            self.sample_sheet(out / "samples.png")
        save_loss_curve(losses, self.config.batch, out / "loss.png")
        last = losses[-100:]
        facts: dict[str, Any] = {
            "images": self.images,
            "steps": self.steps,
            "seconds": self.seconds,
        }
        facts |= {"loss": sum(last) / max(1, len(last)), "config": _fingerprint(self.config)}
        (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        return out / "pipeline"


def _take_weights(module: Any, folder: Path, name: str) -> None:
    """Loads a part's weights from a model's folder, or from the part's own folder."""
    part = folder / name if (folder / name).is_dir() else folder
    saved = type(module).from_pretrained(part, **precision(type(module), torch.float32))
    module.load_state_dict(saved.state_dict())


def _fingerprint(config: LoopConfig) -> str:
    """Returns the options that must agree between a run and its checkpoint, as JSON."""
    learned = {k: v for k, v in asdict(config).items() if k not in _HOW}
    return json.dumps(learned, sort_keys=True, default=str)


def run(trainer: Trainer) -> None:
    """Trains to the end of the budget, resuming an unfinished run, and exports the model.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    config = trainer.config
    if trainer.resume():
        tqdm.write(f"resumed at {trainer.images} images")
    saved, steps = time.monotonic(), 0
    began = time.monotonic() - trainer.seconds
    with tqdm(total=config.images, initial=trainer.images, unit="image", mininterval=10) as bar:
        while trainer.progress < 1 and not 0 < config.stop_after <= steps:
            trainer.step()
            steps += 1
            trainer.seconds = time.monotonic() - began
            if steps % 50 == 0:  # reading a loss waits for the device
                mean = sum(trainer.losses[-50:]) / 50
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss is {mean} after {trainer.steps} steps: give a smaller --lr "
                        "(the last checkpoint is kept)"
                    )
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update(config.batch)
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    trainer.export()
