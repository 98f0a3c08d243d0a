"""ProlificDreamer at sizes that a CPU does in seconds: exact, resumable, and ahead across its schedules."""

from __future__ import annotations

import functools
import gc
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.schedule import TimestepSchedule
from picardopt_3d.guidance.vsd import VSD
from picardopt_3d.methods import Stage, StageConfig, stage_seed
from picardopt_3d.methods.prolificdreamer import PAPER, SMALL, ProlificDreamerConfig
from picardopt_3d.picard import PicardConfig, PicardOptions, make_optimizer
from picardopt_3d.problem import Losses
from picardopt_3d.run import prepare, worker
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.scenes import HashConfig, OccupancyConfig, Scene, load_scene
from picardopt_3d.task import TextTask
from picardopt_3d.tolerances import FixedTol, TolConfig
from picardopt_3d.world import Subject
from picardopt_3d.world.yardstick import psnr_against_truth
from torch import Tensor
from torch.utils import _pytree as pytree

from picardopt import (
    AdaptiveTolerance,
    ImpureClosureError,
    ParallelPicardOptimizer,
    load_checkpoint,
    save_checkpoint,
    step_rng,
)
from tests.helpers.pool import Pools
from tests.integrations.helpers.recipes import sequential
from tests.integrations.helpers.tiny_pipelines import save_stable_diffusion

CPU, SEED, CHANGE = torch.device("cpu"), 3, 4
TASK = TextTask("a red mug")
PLAIN = PicardConfig()
NAMES = ("nerf", "geometry", "texture")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models of the real classes: the pretrained score's, and the LoRA's."""
    path = tmp_path_factory.mktemp("models")
    return {
        "base": save_stable_diffusion(path / "base", seed=0),
        "velocity": save_stable_diffusion(path / "velocity", "v_prediction", seed=1),
    }


def models(config: Any, folders: dict[str, Path]) -> Any:
    """A stage with the random models in place of the published ones."""
    guidance = replace(
        config.guidance, source=str(folders["base"]), options=ModelOptions(embeddings=None)
    )
    if guidance.lora_source is not None:
        guidance = replace(guidance, lora_source=str(folders["velocity"]))
    return replace(config, guidance=guidance)


def published(folders: dict[str, Path]) -> ProlificDreamerConfig:
    """The published settings, with their schedules, at sizes that a CPU does in seconds."""
    table = HashConfig(levels=4, log2_size=8, base=4, scale=1.6)
    nerf: Any = PAPER.nerf.scene
    field = replace(
        nerf, encoding=table, width=8, samples=12, occupancy=replace(nerf.occupancy, resolution=8)
    )
    nerf = replace(PAPER.nerf, scene=field, batch=((0, 3), (5000, 2)), pixels=((0, 6), (5000, 8)))
    rest = {}
    for name in ("geometry", "texture"):
        config = getattr(PAPER, name)
        mesh = replace(config.scene, resolution=8, encoding=table, width=8)
        rest[name] = models(replace(config, scene=mesh, pixels=8, batch=1), folders)
    return ProlificDreamerConfig(nerf=models(nerf, folders), **rest)


def tiny(folders: dict[str, Path], steps: int = 8) -> ProlificDreamerConfig:
    """The same with all changes at one step, and rates at which a few steps matter."""
    recipe = published(folders)
    falling = TimestepSchedule(high=(0.98, 0.5), between=(CHANGE, CHANGE + 1))
    field: Any = recipe.nerf.scene
    occupancy = OccupancyConfig(resolution=6, threshold=0.5, every=2)
    nerf = replace(
        recipe.nerf,
        steps=steps,
        scene=replace(field, occupancy=occupancy, radius=0.6),
        batch=((0, 3), (CHANGE, 2)),
        pixels=((0, 6), (CHANGE, 8)),
        timesteps=falling,
        weights=replace(
            recipe.nerf.weights,
            sparsity=((0, 10.0), (steps, 1.0)),
            opaque=((CHANGE, 0.0), (CHANGE + 1, 1000.0)),
        ),
    )
    meshes = {
        name: replace(
            getattr(recipe, name),
            steps=steps,
            timesteps=falling,
            scene=replace(getattr(recipe, name).scene, radius=0.6),
        )
        for name in ("geometry", "texture")
    }
    return ProlificDreamerConfig(nerf=nerf, **meshes)


def build(config: StageConfig, index: int, previous: Scene | None) -> Stage:
    return build_problem(config, TASK, Path("none"), CPU, stage_seed(SEED, index), previous)


def wrapped(
    stage: Stage, config: StageConfig, index: int, window: int, tolerance: TolConfig | None
) -> ParallelPicardOptimizer:
    """The optimizer as a run has it."""
    options = PicardOptions(config.picard, window, tolerance)
    return make_optimizer(stage, options, config.steps, stage_seed(SEED, index))


def bits(stage: Stage) -> list[Tensor]:
    """The scene with its carry, the LoRA, and the state of every optimizer."""
    states = [base.state_dict()["state"] for base in stage.optimizers()]
    found = pytree.tree_flatten([stage.state_dict(), states])[0]
    return [each.detach().clone() for each in found if isinstance(each, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def before(recipe: ProlificDreamerConfig, name: str) -> tuple[StageConfig, int, Scene | None]:
    """A stage's configuration and index, and the scene that it begins with: no stage before has been trained."""
    previous: Scene | None = None
    for index, (stage, config) in enumerate(recipe.stages()):
        if stage == name:
            return config, index, previous
        previous = build(config, index, previous).scene
    raise KeyError(name)


# -- exact -------------------------------------------------------------------------------------------------


def early_bits(
    folders: dict[str, Path], name: str, window: int
) -> tuple[list[Tensor], list[Losses], int]:
    """A stage at tolerance 0 with a window: what it ends with, the losses of its steps, its evaluations."""
    config, index, previous = before(tiny(folders), name)
    stage = build(config, index, previous)
    optimizer, closure = wrapped(stage, config, index, window, FixedTol(0.0)), closure_of(stage)
    losses = [optimizer.step(closure) for _ in range(config.steps)]
    return bits(stage), losses, optimizer.stats.drift_evaluations


Expected = Callable[[str], tuple[list[Tensor], list[Losses]]]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Expected:
    """What each stage ends with sequentially, and its losses; run once."""
    return functools.cache(functools.partial(expected_bits, folders))


def expected_bits(folders: dict[str, Path], name: str) -> tuple[list[Tensor], list[Losses]]:
    config, index, previous = before(tiny(folders), name)
    stage = build(config, index, previous)
    begun = bits(stage)
    losses = list(sequential(stage, config.steps, stage_seed(SEED, index)))
    assert not same(bits(stage), begun)
    return bits(stage), losses


@pytest.mark.parametrize("window", [pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_at_tolerance_0_is_bitwise_the_sequential_one(
    name: str, window: int, folders: dict[str, Path], expected: Expected
) -> None:
    """Over changes of batch, size, noise levels and weights; with the LoRA and its optimizer."""
    wanted, losses = expected(name)
    found, early, evaluations = early_bits(folders, name, window)
    assert evaluations > len(losses)  # it did run ahead
    assert same(found, wanted)
    for one, other in zip(early, losses, strict=True):
        assert one.terms.keys() == other.terms.keys()
        assert torch.equal(one.total, other.total)


def job(folders: dict[str, Path], name: str) -> bytes:
    """What one rank ends with, by value."""
    found, _, evaluations = early_bits(folders, name, 3)
    return pickle.dumps(([each.numpy() for each in found], evaluations))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_stage_on_two_processes_is_bitwise_the_sequential_one(
    name: str, folders: dict[str, Path], expected: Expected, pools: Pools
) -> None:
    wanted, losses = expected(name)
    for dumped in pools(2).run(job, folders, name, timeout=280):
        found, evaluations = pickle.loads(dumped)
        assert evaluations > len(losses)
        assert same([torch.as_tensor(each) for each in found], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_resumes_bitwise(
    name: str, folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """In the middle, at the change: scene, carry, LoRA and both optimizers go on, the scene before is not read."""
    wanted, _ = expected(name)
    config, index, previous = before(tiny(folders), name)

    def begun(scene: Scene | None) -> tuple[Stage, ParallelPicardOptimizer]:
        stage = build(config, index, scene)
        return stage, wrapped(stage, config, index, 3, FixedTol(0.0))

    stage, optimizer = begun(previous)
    closure = closure_of(stage)
    for _ in range(CHANGE):
        optimizer.step(closure)
    assert not same(bits(stage), wanted)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, stage.state_dict() | {"optimizer": optimizer.state_dict()})
    state = load_checkpoint(path)
    assert ("lora" in state["guidance"]) == (name != "geometry")
    again, optimizer = begun(previous)
    again.load_state_dict(state)
    optimizer.load_state_dict(state["optimizer"])
    closure = closure_of(again)
    for _ in range(config.steps - CHANGE):
        optimizer.step(closure)
    assert same(bits(again), wanted)


def test_the_papers_lora_is_not_checked_by_evaluating_steps_again(
    folders: dict[str, Path],
) -> None:
    """Its steps would differ: it has learnt in between. It runs ahead all the same."""
    nerf = tiny(folders, 12).nerf
    config = replace(nerf, vsd=replace(nerf.vsd, lora="paper", learning_rate=0.1), picard=PLAIN)
    assert config.caution is not None
    assert nerf.caution is None
    stage = build(config, 0, None)
    assert not stage.repeatable
    assert len(stage.optimizers()) == 1  # the scene's
    optimizer, closure = wrapped(stage, config, 0, 4, None), closure_of(stage)
    for _ in range(config.steps):
        optimizer.step(closure)
    assert optimizer.stats.sweeps < config.steps
    checked = ParallelPicardOptimizer(
        stage.optimizers(), carry=stage.carry(), total_steps=config.steps, window=4
    )
    with pytest.raises(ImpureClosureError):
        for _ in range(config.steps):
            checked.step(closure)


# -- schedules ---------------------------------------------------------------------------------------------


def shown(stage: Stage, step: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What one step shows its guidance, and how much each of its losses counts."""
    seen: dict[str, Any] = {}
    guidance = stage.guidance

    def watched(views: Tensor, prompt: Any, cameras: Any, levels: tuple[float, float]) -> Tensor:
        seen.update(views=tuple(views.shape), levels=levels, cameras=len(cameras))
        return guidance(views, prompt, cameras, levels)

    monkeypatch.setattr(stage, "guidance", watched)
    with step_rng(0, step):
        losses = stage.loss(step)
    monkeypatch.undo()
    rest = losses.total - losses.terms["sds"]
    for name, weight in stage.config.weights.at(step).items():  # type: ignore[attr-defined]
        if name != "sds":
            rest = rest - weight * losses.terms[name]
    assert rest.abs() <= 1e-5 * losses.total.abs()
    return seen | {"losses": losses.terms.keys()}


def test_the_published_schedules_move(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the losses of single steps, on both sides of each change."""
    config = published(folders).nerf
    stage = build(config, 0, None)
    first, later = {"sds", "sparsity"}, {"sds", "sparsity", "opaque"}
    expected = {
        0: ((3, 3, 6, 6), 0.98, first),
        4999: ((3, 3, 6, 6), 0.98, first),
        5000: ((2, 3, 8, 8), 0.98, first),
        5001: ((2, 3, 8, 8), 0.5, first),
        10_000: ((2, 3, 8, 8), 0.5, first),
        10_001: ((2, 3, 8, 8), 0.5, later),
        24_999: ((2, 3, 8, 8), 0.5, later),
    }
    for step, (views, high, losses) in expected.items():
        seen = shown(stage, step, monkeypatch)
        assert (seen["views"], seen["cameras"]) == (views, views[0]), step
        assert seen["levels"] == (0.02, high), step
        assert seen["losses"] == losses, step
    assert PAPER.nerf.weights.at(24_999) == {"sds": 1.0, "sparsity": 10.0, "opaque": 1000.0}
    assert [PAPER.nerf.batch, PAPER.nerf.pixels] == [((0, 8), (5000, 2)), ((0, 64), (5000, 512))]


@pytest.mark.parametrize("name", ["default", "published"])
def test_strides_do_not_collapse_where_batch_size_and_weights_change(
    name: str, folders: dict[str, Path]
) -> None:
    """Windows that hold steps from both sides of the change are accepted as others are."""
    recipe = tiny(folders, 12)
    changing = recipe.nerf if name == "published" else replace(recipe.nerf, picard=PLAIN)
    constant = replace(
        changing,
        batch=2,
        pixels=8,
        timesteps=TimestepSchedule(),
        weights=replace(changing.weights, sparsity=10.0, opaque=0.0),
    )
    across, strides = {}, {}
    for kind, config in (("changing", changing), ("constant", constant)):
        stage = build(config, 0, None)
        optimizer, closure = wrapped(stage, config, 0, 4, None), closure_of(stage)
        for _ in range(config.steps):
            optimizer.step(closure)
        strides[kind] = optimizer.stats.strides
        ends = [sum(strides[kind][: i + 1]) for i in range(len(strides[kind]))]
        across[kind] = [
            stride
            for stride, end in zip(strides[kind], ends, strict=True)
            if end - stride < CHANGE + 1 <= end + 3
        ]
    assert max(across["changing"]) >= 2
    assert len(strides["changing"]) <= len(strides["constant"]) + 2


# -- published, and in memory ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_published_settings_run_two_sweeps_on_the_real_pipelines(
    name: str, folders: dict[str, Path]
) -> None:
    """A LoRA on a model that predicts the velocity, beside one that predicts the noise."""
    config, index, previous = before(published(folders), name)
    stage = build(config, index, previous)
    optimizer, closure = wrapped(stage, config, index, 7, None), closure_of(stage)
    trained = [p for base in stage.optimizers() for g in base.param_groups for p in g["params"]]
    begun = [parameter.detach().clone() for parameter in trained]
    while optimizer.stats.sweeps < 2:
        assert optimizer.step(closure).total.isfinite()
    assert isinstance(optimizer.tolerance, AdaptiveTolerance)
    moved = [not torch.equal(one, other) for one, other in zip(begun, trained, strict=True)]
    assert all(moved)
    guidance = stage.guidance
    if isinstance(guidance, VSD):
        kinds = guidance.score.prediction_type, guidance.lora_score.prediction_type
        assert kinds == ("epsilon", "v_prediction")
        assert len(stage.optimizers()) == 2


def run_config(recipe: ProlificDreamerConfig, text: str, out: Path) -> TextTo3DConfig[Any]:
    """A sequential run without pictures."""
    return TextTo3DConfig(
        prompt=text,
        out=out,
        method="prolificdreamer",
        preset="small",
        recipe=recipe,
        sequential=True,
        device="cpu",
        picture_every=0,
    )


def networks() -> int:
    """How many score networks are in memory; nothing is collected for the count."""
    return sum(type(each) is UNet2DConditionModel for each in gc.get_objects())


@pytest.mark.parametrize("shared", [True, False], ids=["two-models", "one-model"])
def test_no_stage_is_trained_beside_the_networks_of_another(
    shared: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(folders, 2)
    if not shared:  # the LoRA is then on a network that only its stage may use
        alone = {
            name: replace(config, guidance=replace(config.guidance, lora_source=None))
            for name, config in recipe.stages()
        }
        recipe = ProlificDreamerConfig(**alone)  # type: ignore[arg-type]
    config = run_config(recipe, TASK.text, tmp_path / "run")
    training, preparing = [], []
    train_stage, prepared = worker._train_stage, prepare._prepared

    def watched(*arguments: Any) -> float:
        training.append(networks())
        return train_stage(*arguments)

    def counted(*arguments: Any, **options: Any) -> prepare.PreparedStage:
        stage = prepared(*arguments, **options)
        preparing.append(networks())
        return stage

    monkeypatch.setattr(worker, "_train_stage", watched)
    monkeypatch.setattr(prepare, "_prepared", counted)
    gc.collect()
    others = networks()
    gc.disable()
    try:
        worker.train(config, time.time())
    finally:
        gc.enable()
    assert [count - others for count in training] == ([2, 1, 2] if shared else [1, 1, 1])
    # The stage before is dropped once the next one is there, and the network that both use is not loaded again.
    assert max(preparing) - others == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute on a core of its own
def test_the_small_preset_makes_a_cube_of_each_stage(tmp_path: Path) -> None:
    """A mesh shows less than the field that it is made of.

    Its new colours win some of that back on the mean of five texts, not on this one (benchmarks/results/methods.md).
    """
    config = run_config(SMALL, "a red cube", tmp_path / "run")
    worker.train(config, time.time())
    folder, quality = RunFolder(config.out), []
    for index, (name, _) in enumerate(SMALL.stages()):
        scene = load_scene(folder.stage(index, name).scene)
        quality.append(psnr_against_truth(scene, Subject("cube", "red"), 32))
    field, shape, textured = quality
    assert field > 21.5
    assert shape > 20.5
    assert textured > 20.0
