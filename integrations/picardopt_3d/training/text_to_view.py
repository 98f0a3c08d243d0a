"""Train the guidance model that ships with the package.

    python -m picardopt_3d.training.text_to_view --out training/text-to-view --images 300000

Writes, under `--out`: the rendered views, a checkpoint every few minutes (the same command resumes from it, with the
same result as a run that was never cut off), a sheet of samples, the loss curve, and `pipeline/`, a diffusers
pipeline folder with the averaged weights in half precision.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.domain import COLOURS, SHAPES, Subject, all_subjects
from picardopt_3d.training.data import Views
from picardopt_3d.training.models import ModelConfig, build_pipeline, save_half_precision


@dataclass(frozen=True)
class TrainingConfig:
    """How the guidance model is trained.

    Attributes:
        out: Folder for everything that is written.
        images: Training images in all; the learning rate decays over them.
        minutes: If positive, an upper limit of the training time: the learning rate then decays over whichever of
            the two budgets is further spent, and the run is no longer the same on every machine.
        stop_after: If positive, leave (with a checkpoint) after this many optimizer steps of this process.
        batch: Images a step.
        lr: Peak learning rate.
        warmup: Steps to reach it.
        weight_decay: AdamW's.
        drop_caption: Chance that an image comes without its caption (for classifier-free guidance).
        drop_camera: Chance that it comes without its camera.
        ema: Largest decay of the weight average.
        views: Rendered views a shape.
        seed: Of the weights, the views and the draws.
        checkpoint_minutes: Minutes between checkpoints.
        sample_steps: Denoising steps of the sample sheet.
        model: Sizes.
    """

    out: Path
    images: int = 300_000
    minutes: float = 0.0
    stop_after: int = 0
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 1e-3
    drop_caption: float = 0.1
    drop_camera: float = 0.1
    ema: float = 0.999
    views: int = 1536
    seed: int = 0
    checkpoint_minutes: float = 4.0
    sample_steps: int = 50
    model: ModelConfig = field(default_factory=ModelConfig)


class Trainer:
    """The training run: everything that a checkpoint holds, and one step of it.

    Args:
        config: How to train.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        config.out.mkdir(parents=True, exist_ok=True)
        self.views = Views.cached(
            config.out / "views.pt", config.views, config.model.size, config.seed
        )
        captions = [text for subject in all_subjects() for text in subject.captions]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.pipeline = build_pipeline(config.model, captions)
        self.unet, self.text_encoder = self.pipeline.unet, self.pipeline.text_encoder
        self.unet.to(memory_format=torch.channels_last).train()
        self.text_encoder.train()
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.ema = EMAModel(self.parameters, decay=config.ema)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.alphas = self.pipeline.scheduler.alphas_cumprod
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def images(self) -> int:
        """Images seen."""
        return len(self.losses) * self.config.batch

    @property
    def progress(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        spent = self.images / self.config.images
        if self.config.minutes > 0:
            spent = max(spent, self.seconds / (60 * self.config.minutes))
        return min(1.0, spent)

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        started = time.monotonic()
        warm = min(1.0, (len(self.losses) + 1) / self.config.warmup)
        lr = self.config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        self.losses.append(loss.item())
        self.seconds += time.monotonic() - started
        return self.losses[-1]

    def _loss(self) -> Tensor:
        """Squared error of the predicted velocity, at times spread evenly over the batch."""
        config = self.config
        batch = self.views.draw(
            config.batch, self.generator, config.drop_caption, config.drop_camera
        )
        spread = torch.arange(config.batch) + torch.rand(config.batch, generator=self.generator)
        timesteps = (
            (spread / config.batch * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        )
        noise = torch.randn(batch.views.shape, generator=self.generator)
        scheduler = self.pipeline.scheduler
        noisy = scheduler.add_noise(batch.views, noise, timesteps)
        target = scheduler.get_velocity(batch.views, noise, timesteps)
        predicted = self.unet(
            noisy.contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=self.pipeline.encode(batch.captions),
            class_labels=batch.conditions,
        ).sample
        return torch.nn.functional.mse_loss(predicted, target)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "config": _fingerprint(self.config),
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": self.seconds,
        }
        temporary = self.config.out / "checkpoint.partial"
        torch.save(state, temporary)
        os.replace(temporary, self.config.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Take up the checkpoint, if there is one.

        Raises:
            ValueError: The checkpoint is of a run with other settings.
        """
        path = self.config.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["config"] != _fingerprint(self.config):
            raise ValueError(
                f"out={str(self.config.out)!r} holds a checkpoint of a run with other settings "
                f"({state['config']}): give another --out, or delete {path}"
            )
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])
        self.losses = state["losses"].tolist()
        self.seconds = state["seconds"]
        return True

    def export(self) -> Path:
        """Write the averaged weights as a pipeline folder, with samples and the loss curve beside it."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            folder = self.config.out / "pipeline"
            save_half_precision(self.pipeline, folder)
            _sample_sheet(self, self.config.out / "samples.png")
        finally:
            self.ema.restore(self.parameters)
        _loss_curve(self.losses, self.config.batch, self.config.out / "loss.png")
        facts = {"images": self.images, "steps": len(self.losses), "seconds": self.seconds}
        facts["loss"] = sum(self.losses[-100:]) / max(1, len(self.losses[-100:]))
        (self.config.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        return folder


def _fingerprint(config: TrainingConfig) -> str:
    """What must agree between a run and its checkpoint, as text."""
    ignored = {"out", "stop_after", "checkpoint_minutes", "minutes", "sample_steps"}
    return json.dumps({k: v for k, v in asdict(config).items() if k not in ignored}, sort_keys=True)


def _sample_sheet(trainer: Trainer, path: Path) -> None:
    """Each shape in one colour from six cameras: samples of the model, deterministic."""
    pipeline = trainer.pipeline
    azimuths = torch.arange(6) * 60.0
    cameras = orbit_cameras(torch.tensor([15.0, 15.0, 15.0, 40.0, 40.0, 0.0]), azimuths)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for shape, colour in zip(SHAPES, COLOURS, strict=True):
        prompts = [Subject(shape, colour).caption] * len(cameras)
        generator = torch.Generator().manual_seed(0)
        views = pipeline(
            prompts,
            cameras,
            num_inference_steps=trainer.config.sample_steps,
            generator=generator,
        )
        rows.append(torch.cat(list(views), dim=-1))
    sheet = (torch.cat(rows, dim=-2) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def _loss_curve(losses: list[float], batch: int, path: Path) -> None:
    """The loss, averaged over 50 steps, against images seen."""
    window = 50
    means = [
        sum(losses[start : start + window]) / len(losses[start : start + window])
        for start in range(0, len(losses), window)
    ]
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.semilogy([(index + 0.5) * window * batch for index in range(len(means))], means)
    axes.set(xlabel="images", ylabel="squared error of the velocity")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def train(config: TrainingConfig) -> Trainer:
    """Train, or take up an unfinished run, to the end of its budget."""
    trainer = Trainer(config)
    if trainer.resume():
        tqdm.write(f"resumed at {trainer.images} images")
    saved, steps = time.monotonic(), 0
    with tqdm(total=config.images, initial=trainer.images, unit="image", mininterval=10) as bar:
        while trainer.progress < 1 and not 0 < config.stop_after <= steps:
            loss = trainer.step()
            steps += 1
            bar.update(config.batch)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    trainer.export()
    return trainer


if __name__ == "__main__":
    train(tyro.cli(TrainingConfig, description=__doc__))
