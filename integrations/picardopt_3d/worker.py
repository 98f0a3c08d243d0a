"""What every worker of a run does: optimise the scene through picardopt, and keep checkpoints."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from picardopt import Carry, ParallelPicardOptimizer, step_rng
from picardopt.bases import JoinedOptimizer
from picardopt.drift import map_tensors
from picardopt.interrupts import interrupts_allowed, interrupts_deferred

from .cameras import turntable_cameras
from .config import CONFIG_FILE, ImageTo3DConfig, RunConfig, save_config
from .evaluate.runs import pick_device
from .export.files import replacing
from .export.pictures import rows_of, save_png, tile
from .guidance.choose import load_guidance
from .images import ReferenceImage, load_reference
from .methods import Context, Stage
from .problem import Losses
from .progress import Progress
from .prompts import ImagePrompt, TextPrompt
from .record import Recorder, Trained, load_run, save_run
from .scenes import Scene, save_scene
from .speculation import wrap

SCENE_FILE = "scene.safetensors"
CHECKPOINT_FILE = "checkpoint.pt"
INPUT_FILE = "input.png"


@dataclass(frozen=True, eq=False)
class Ready:
    """A run that is about to begin or to go on.

    Attributes:
        stage: the recipe at work.
        base: what its scene is stepped by.
        optimizer: the same, wrapped; None in a sequential run.
        trained: the record so far.
    """

    stage: Stage
    base: torch.optim.Optimizer
    optimizer: ParallelPicardOptimizer | None
    trained: Trained


def train(config: RunConfig[Any], started: float, resume: bool = False) -> Trained:
    """Optimise the scene; every worker runs this, rank 0 shows progress and writes the files.

    Whatever ends it early, Ctrl-C or an error, leaves the last committed step in the checkpoint, if there is one.

    Args:
        config: the run's options, which are kept in its folder once they have proved to be usable.
        started: `time.time()` when the command began.
        resume: go on from the checkpoint in the run's folder.
    """
    return _optimise(config, _prepare(config, resume), started)


def train_launched(config: RunConfig[Any], started: float, resume: bool) -> Exception | None:
    """`train` as a worker of `launch`: returns what other options can mend, for the launching process to raise.

    A launcher makes a page of tracebacks of what a worker raises.
    """
    try:
        ready = _prepare(config, resume)
    except (ValueError, OSError) as error:
        return error
    _optimise(config, ready, started)
    return None


def _prepare(config: RunConfig[Any], resume: bool) -> Ready:
    """Do all that unusable options or files can make fail; nothing is written."""
    torch.set_num_threads(config.threads)
    with _agreed():
        device = torch.device(pick_device(config.device))
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        stage = build_stage(config, device)
    with _agreed():
        optimizers = stage.optimizers()
        base = optimizers[0] if len(optimizers) == 1 else JoinedOptimizer(optimizers)
        optimizer = None if config.sequential else wrap(base, stage, config)
        trained = Trained.of(config, dist.get_world_size() if dist.is_initialized() else 1, device)
        if resume:
            load_run(config.out / CHECKPOINT_FILE, trained, stage, optimizer or base)
    return Ready(stage, base, optimizer, trained)


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Raise what other options can mend in every worker if it is raised in one, so that none waits for the other."""
    found: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        found = error
    if dist.is_initialized():
        everyones: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        found = found or next(filter(None, everyones), None)
    if found is not None:
        raise found


def _optimise(config: RunConfig[Any], ready: Ready, started: float) -> Trained:
    """The training loop."""
    stage, base, optimizer, trained = ready.stage, ready.base, ready.optimizer, ready.trained
    scheduler = stage.lr_scheduler()
    rank = dist.get_rank() if dist.is_initialized() else 0
    checkpoint = config.out / CHECKPOINT_FILE
    if rank == 0:
        save_config(config, config.out / CONFIG_FILE)
    recorder = Recorder(trained, optimizer, started)
    with _shown(config, recorder, rank) as progress, first_signal_only():
        try:
            for step in range(trained.step, config.recipe.steps):
                if optimizer is None:
                    with interrupts_deferred():  # a step that is done is counted too
                        values = sequential_step(base, stage.loss, config.seed, step, stage.carry())
                        recorder.took(step, values)
                else:
                    values = optimizer.step(picard_closure(base, stage.loss))
                    recorder.took(step, values)
                if scheduler is not None:
                    scheduler.step()
                if rank == 0:
                    progress.step(step, values, stage.scene)
                    every = config.checkpoint_every
                    if every and (step + 1) % every == 0:
                        save_run(checkpoint, recorder, stage, optimizer or base)
        finally:
            recorder.count()
            if rank == 0 and trained.step:
                with interrupts_deferred():
                    save_run(checkpoint, recorder, stage, optimizer or base)
                    with replacing(config.out / SCENE_FILE) as temporary:
                        save_scene(stage.scene, temporary)
    return trained


def build_stage(config: RunConfig[Any], device: torch.device) -> Stage:
    """The recipe at work on a new scene, under the score model that it names."""
    recipe, image = config.recipe, None
    prompt: TextPrompt | ImagePrompt = recipe.guidance.text_prompt(config.title)
    if isinstance(config, ImageTo3DConfig):
        image = reference_of(config)
        prompt = image.prompt()
    guidance = load_guidance(
        recipe.guidance, prompt, recipe.final_pixels, device, sds=recipe.sds, vsd=recipe.vsd
    )
    # The seed of the whole run: a scene's first weights are drawn before step 0.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        stage: Stage = recipe.build(Context(guidance, prompt, device, image))
        return stage


def reference_of(config: ImageTo3DConfig[Any]) -> ReferenceImage:
    """The picture of a run as the pipeline has prepared it, with the camera that took it."""
    distance, fov = middle_view(config)
    return load_reference(
        config.out / INPUT_FILE,
        elevation=config.elevation,
        azimuth=config.azimuth,
        distance=distance,
        fov=fov,
        prepared=True,
    )


def middle_view(config: RunConfig[Any]) -> tuple[float, float]:
    """Distance and field of view in the middle of those that training views have."""
    cameras = config.recipe.cameras
    return sum(cameras.distance) / 2, sum(cameras.fov) / 2


def sequential_step(
    base: torch.optim.Optimizer,
    loss_of: Callable[[int], Losses],
    seed: int,
    step: int,
    carry: Carry | None = None,
) -> Losses:
    """One step of the sequential run, which a Picard run at tolerance 0 equals bitwise."""
    with step_rng(seed, step), interrupts_deferred():
        with interrupts_allowed():
            values = picard_closure(base, loss_of)(step)
        base.step()
        if carry is not None and carry.update is not None:
            carry.update(values)
    return map_tensors(Tensor.detach, values)  # type: ignore[no-any-return]


def picard_closure(
    base: torch.optim.Optimizer, loss_of: Callable[[int], Losses]
) -> Callable[[int], Losses]:
    """The drift of a step: gradients of its loss."""

    def closure(step: int) -> Losses:
        base.zero_grad(set_to_none=True)
        try:
            values = loss_of(step)
            values.total.backward()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\nA step does not fit into the device's memory: lower recipe.batch, recipe.pixels or "
                "recipe.scene.samples, or give the score model less (recipe.guidance.options: dtype, offload, slicing)"
            ) from error
        return values

    return closure


def save_progress_picture(scene: Scene, path: Path, step: int, view: tuple[float, float]) -> None:
    """Four views around the scene: colour, normals and opacity, a row each."""
    device = next(scene.parameters()).device
    cameras = turntable_cameras(4, distance=view[0], fov=view[1]).to(device)
    with torch.no_grad():
        render = scene.render(cameras, 64, normals=True, step=step)
    save_png(tile(rows_of(render), scale=2), path)


@contextlib.contextmanager
def _shown(config: RunConfig[Any], recorder: Recorder, rank: int) -> Iterator[Progress]:
    """The bar, and what goes beside it: pictures, TensorBoard."""
    bar = tqdm(
        total=config.recipe.steps,
        initial=recorder.trained.step,
        desc=config.title,
        unit="step",
        disable=rank != 0,
    )
    view = middle_view(config)

    def picture(scene: Scene, step: int) -> Path:
        path = config.out / "progress" / f"step_{step + 1:05d}.png"
        save_progress_picture(scene, path, step, view)
        return path

    folder = config.out / "tensorboard" if config.tensorboard and rank == 0 else None
    with bar, Progress(bar, recorder, config.picture_every, picture, folder) as progress:
        yield progress


@contextlib.contextmanager
def first_signal_only() -> Iterator[None]:
    """Let one SIGINT or SIGTERM interrupt the block, and no second one what then is saved.

    A terminal's Ctrl-C reaches every process, and a launcher then signals its workers again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
