"""Variational score distillation inside the fixed point: at tolerance 0 the sequential run, with the LoRA."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import random_cameras
from picardopt_3d.guidance.choose import load_guidance
from picardopt_3d.guidance.vsd import VSD, VsdConfig
from picardopt_3d.methods import METHODS, Context
from picardopt_3d.picard import PicardConfig, PicardOptions, make_optimizer
from picardopt_3d.run.drifts import group_names
from picardopt_3d.tolerances import DriftTol
from torch import Tensor

from picardopt import (
    DriftTolerance,
    ImpureClosureError,
    ParallelPicardOptimizer,
    load_checkpoint,
    save_checkpoint,
    step_rng,
)
from tests.helpers.pool import Pools
from tests.integrations.helpers.distillation import load, stir
from tests.integrations.helpers.tiny_pipelines import save_both_predictions

STEPS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_both_predictions(tmp_path_factory.mktemp("models"))


class Run:
    """A picture that is its own scene, and VSD on it."""

    def __init__(self, folder: Path, lora: str = "inside") -> None:
        torch.manual_seed(1)
        self.vsd = stir(VSD(load(folder), VsdConfig(lora=lora, rank=1)))  # type: ignore[arg-type]
        self.prompt = self.vsd.encode("a red mug")
        self.scene = torch.nn.Parameter(torch.randn(1, 3, 16, 16))
        self.losses: list[Tensor] = []

    def closure(self) -> Callable[[int], Tensor]:
        """A function of the scene and the guidance, not of this object, whose log of losses grows."""
        scene, vsd, prompt = self.scene, self.vsd, self.prompt

        def closure(step: int) -> Tensor:
            for parameter in [scene, *vsd.lora_parameters]:
                parameter.grad = None
            loss = vsd(scene.sigmoid(), prompt, random_cameras(1))
            loss.backward()
            return loss

        return closure

    def signs(self) -> list[torch.optim.Optimizer]:
        """Bases that step by signs alone: a drift at a guess that is nearly right is right in every bit."""
        return [
            torch.optim.Rprop([self.scene], lr=1e-6, step_sizes=(0, 1e-6)),
            torch.optim.Rprop(self.vsd.lora_parameters, lr=1e-7, step_sizes=(0, 1e-7)),
        ]

    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.scene], lr=0.01)

    def wrapped(self) -> ParallelPicardOptimizer:
        scene = self.adam()
        return ParallelPicardOptimizer([scene, *self.vsd.optimizers()], measured=[scene], **OPTIONS)

    def sequential(self, bases: list[torch.optim.Optimizer]) -> Run:
        closure = self.closure()
        for step in range(STEPS):
            with step_rng(7, step):
                self.losses.append(closure(step).detach())
                for base in bases:
                    base.step()
        return self

    def parallel(self, optimizer: ParallelPicardOptimizer) -> Run:
        closure = self.closure()
        for _ in range(STEPS):
            self.losses.append(optimizer.step(closure))
        return self

    def bits(self) -> list[Tensor]:
        return [t.detach() for t in [self.scene, *self.vsd.lora_parameters, *self.losses]]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OPTIONS: dict[str, Any] = {"window": 4, "tolerance": 0.0, "seed": 7, "total_steps": STEPS}


def job(folder: Path, bases: str) -> tuple[bytes, list[int], int]:
    """What one rank ends with: every bit of the run (by value), its strides, its evaluations."""
    run = Run(folder)
    if bases == "signs":
        optimizers = run.signs()
        optimizer = ParallelPicardOptimizer(optimizers, measured=optimizers[:1], **OPTIONS)
    else:
        optimizer = run.wrapped()
    run.parallel(optimizer)
    stats = optimizer.stats
    return pickle.dumps([t.numpy() for t in run.bits()]), stats.strides, stats.drift_evaluations


def as_tensors(dumped: bytes) -> list[Tensor]:
    return [torch.as_tensor(array) for array in pickle.loads(dumped)]


def test_at_tolerance_0_it_is_the_sequential_run_bitwise(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    run.sequential(run.signs())
    dumped, strides, _ = job(folders["epsilon"], "signs")
    assert same(as_tensors(dumped), run.bits())
    assert max(strides) >= 2
    assert sum(strides) == STEPS
    assert not torch.equal(run.scene, Run(folders["epsilon"]).scene)


@pytest.mark.slow
def test_two_processes_at_tolerance_0_are_the_sequential_run_bitwise(
    folders: dict[str, Path], pools: Pools
) -> None:
    run = Run(folders["epsilon"])
    run.sequential(run.signs())
    results = pools(2).run(job, folders["epsilon"], "signs", timeout=280)
    for dumped, strides, _ in results:
        assert same(as_tensors(dumped), run.bits())
        assert max(strides) >= 2


@pytest.mark.slow
def test_the_usual_optimizers_are_exact_too(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    run.sequential([run.adam(), run.vsd.optimizer])
    dumped, _, evaluations = job(folders["epsilon"], "adam")
    assert same(as_tensors(dumped), run.bits())
    assert evaluations > STEPS  # it ran ahead


def test_only_the_scene_and_the_lora_are_in_the_rows(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    optimizer = run.wrapped()
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    lora = sum(p.numel() for p in run.vsd.lora_parameters)
    assert held == run.scene.numel() + lora
    assert lora < 0.1 * sum(p.numel() for p in run.vsd.score.unet.parameters())


def test_the_papers_lora_is_not_exact(folders: dict[str, Path]) -> None:
    """One evaluation a step is its sequential run; a window evaluates more, and its LoRA learns from those too."""
    results = {}
    for window in (1, 4):
        run = Run(folders["epsilon"], "paper")
        assert run.vsd.optimizers() == []
        optimizer = ParallelPicardOptimizer(
            run.adam(), audit="never", **{**OPTIONS, "window": window}
        )
        assert len(optimizer.param_groups) == 1
        results[window] = run.parallel(optimizer).bits()
    run = Run(folders["epsilon"], "paper")
    run.sequential([run.adam(), run.vsd.optimizer])
    assert same(results[1], run.bits())
    assert not same(results[4][:1], run.bits()[:1])


def test_the_papers_lora_is_what_the_audit_looks_for(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"], "paper")
    run.vsd.optimizer.param_groups[0]["lr"] = 0.1
    optimizer = ParallelPicardOptimizer(run.adam(), **{**OPTIONS, "tolerance": 1.0})
    with pytest.raises(ImpureClosureError):
        run.parallel(optimizer)


def small_nerf(**changed: Any) -> Any:
    """The shipped preset with VSD, three steps long and small."""
    preset = METHODS["text-to-3d"]["dreamfusion"].presets["small-nerf"]
    guidance = replace(preset.guidance, loss="vsd")
    return replace(
        preset, **({"guidance": guidance, "steps": 4, "batch": 1, "pixels": 16} | changed)
    )


class CommandRun:
    """A stage as a run loop holds it; what `save` returns is all that goes on."""

    def __init__(self, window: int) -> None:
        config = small_nerf()
        torch.manual_seed(0)
        guidance = load_guidance(config.guidance, "a blue chair", 16, "cpu", vsd=config.vsd)
        prompt = config.guidance.text_prompt("a blue chair")
        self.stage = config.build(Context(guidance, prompt, torch.device("cpu")))
        self.optimizer = ParallelPicardOptimizer(
            self.stage.optimizers(),
            measured=self.stage.measured(),
            carry=self.stage.carry(),
            total_steps=config.steps,
            window=window,
            tolerance=0,
        )

    def closure(self, step: int) -> Any:
        self.optimizer.zero_grad()
        losses = self.stage.loss(step)
        losses.total.backward()
        return losses

    def go_on(self, steps: int) -> CommandRun:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def bits(self) -> list[Tensor]:
        assert isinstance(self.stage.guidance, VSD)
        return [*self.stage.scene.state_dict().values(), *self.stage.guidance.lora_parameters]


def test_a_stage_with_vsd_resumes_bitwise(tmp_path: Path) -> None:
    whole, stopped, again = CommandRun(1).go_on(4), CommandRun(3).go_on(2), CommandRun(3)
    assert not same(again.bits()[-4:], stopped.bits()[-4:])  # the LoRA has learnt
    state = stopped.stage.state_dict() | {"optimizer": stopped.optimizer.state_dict()}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    again.stage.load_state_dict(kept)
    again.optimizer.load_state_dict(kept["optimizer"])
    assert same(again.go_on(2).bits(), whole.bits())
    assert again.optimizer.stats.drift_evaluations > 2  # it ran ahead


def test_the_lora_is_judged_too_and_by_its_own_loss(folders: dict[str, Path]) -> None:
    stage = CommandRun(1).stage
    scene, lora = stage.optimizers()
    assert stage.measured() == [scene, lora]
    assert group_names(stage.measured())[-1] == "lora"
    for tolerance in (None, DriftTol(noise=0.05)):
        optimizer = make_optimizer(stage, PicardOptions(PicardConfig(2, tolerance)), 4, 0)
        assert isinstance(optimizer.tolerance, DriftTolerance)
        assert optimizer.tolerance.losses == (len(scene.param_groups), 1)
        assert optimizer.tolerance.noise == (0.2 if tolerance is None else 0.05)
    held = {id(p) for group in lora.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.guidance.lora_parameters}
