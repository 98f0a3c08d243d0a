"""Magic3D at sizes that a CPU does in seconds: each stage exact and resumable, and what it hands on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.command import _cautions, _print_notes
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.magic3d import PAPER, SMALL, Magic3DConfig
from picardopt_3d.methods.optim import mesh_rates
from picardopt_3d.methods.refine import Refine, RefineWeights
from picardopt_3d.picard import PicardConfig, PicardOptions, make_optimizer
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.pipeline import resume
from picardopt_3d.run.prepare import _figures, build_problem
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import HashConfig, TexturedMeshConfig, build_scene, load_scene
from picardopt_3d.scenes.mesh.tetrahedral import Tetrahedral
from picardopt_3d.task import TextTask
from picardopt_3d.world.yardstick import psnr_against_truth
from safetensors.torch import load_file

from tests.helpers.pool import Pools
from tests.integrations.helpers.recipes import CHAIR, CPU, save_pipelines
from tests.integrations.helpers.stopping import stopped

TASK = TextTask("a red chair")
TABLE = HashConfig(levels=3, log2_size=8, base=4, scale=1.6)


def published(folders: dict[str, Path]) -> Magic3DConfig:
    """The published settings at sizes that a CPU does in seconds, with random models of the real classes."""

    def local(guidance: GuidanceConfig) -> GuidanceConfig:
        options = ModelOptions(embeddings=None)
        return replace(guidance, source=str(folders[guidance.model]), options=options)

    coarse, refine = PAPER.coarse, PAPER.refine
    field: Any = coarse.scene
    mesh: Any = refine.scene
    field = replace(
        field, encoding=TABLE, samples=12, occupancy=replace(field.occupancy, resolution=8)
    )
    mesh = replace(mesh, encoding=TABLE, resolution=8)
    sizes: dict[str, Any] = {"batch": 2, "pixels": 8}
    return Magic3DConfig(
        coarse=replace(coarse, scene=field, guidance=local(coarse.guidance), **sizes),
        refine=replace(refine, scene=mesh, guidance=local(refine.guidance), **sizes),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Magic3DConfig:
    """A few steps of each, at the optimizer's own window and rule, lit from the third step on."""
    recipe = published(folders)
    field: Any = recipe.coarse.scene
    mesh: Any = recipe.refine.scene
    lit = ShadingConfig(ambient_steps=2, soft=True, placement="magic3d")
    return Magic3DConfig(
        coarse=replace(
            recipe.coarse,
            steps=5,
            scene=replace(field, radius=0.6, occupancy=replace(field.occupancy, every=2)),
            shading=lit,
            picard=PicardConfig(),
        ),
        refine=replace(
            recipe.refine,
            steps=8,
            scene=replace(mesh, radius=0.6),
            rates=mesh_rates(shape=0.1),
            weights=RefineWeights(normal_consistency=3.0, laplacian=2.0),
            shading=lit,
            picard=PicardConfig(),
        ),
    )


def run_of(out: Path, recipe: Magic3DConfig, **options: Any) -> TextTo3DConfig:
    common: dict[str, Any] = {"workers": 1, "picture_every": 0, "checkpoint_every": 0}
    return TextTo3DConfig(
        prompt=TASK.text,
        out=out,
        method="magic3d",
        preset="paper",
        recipe=recipe,
        **common | options,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: Magic3DConfig) -> TextTo3DConfig:
    """The sequential run."""
    config = run_of(tmp_path_factory.mktemp("alone"), tiny, sequential=True)
    train(config, time.time())
    return config


def assert_same(one: TextTo3DConfig, other: TextTo3DConfig) -> None:
    """Both stages have the same scenes and losses."""
    pairs = zip(RunFolder(one.out).begun(), RunFolder(other.out).begun(), strict=True)
    for own, wanted in pairs:
        first, second = load_file(own.scene), load_file(wanted.scene)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert RunRecord.load(own).losses == RunRecord.load(wanted).losses


# -- what does not repeat --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grid", "texture"])
def test_a_stage_that_nvdiffrast_draws_is_not_checked_by_evaluating_steps_again(
    tiny: Magic3DConfig, kind: str
) -> None:
    """Its gradients do not repeat. Only the flag is set here: nvdiffrast itself needs CUDA."""
    drawn: Any = tiny.refine.scene if kind == "grid" else TexturedMeshConfig(texture=16)
    plain = replace(tiny.refine, scene=replace(drawn, rasterizer="torch"))
    config = replace(tiny.refine, scene=replace(drawn, rasterizer="nvdiffrast"))
    assert plain.caution is None
    assert config.caution is not None
    assert "is the sequential run at no tolerance" in config.caution
    stage = build_problem(tiny.refine, TASK, Path("none"), CPU, 0)
    for given, repeatable in ((plain, True), (config, False)):
        stage.scene = build_scene(given.scene)
        assert stage.repeatable is repeatable


def test_a_run_that_nvdiffrast_draws_says_at_its_start_that_it_is_inexact(
    tmp_path: Path, tiny: Magic3DConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in its report; a sequential run is what it is."""
    mesh: Any = tiny.refine.scene
    refine = replace(tiny.refine, scene=replace(mesh, rasterizer="nvdiffrast"))
    config = run_of(tmp_path, replace(tiny, refine=refine))
    _print_notes(_cautions(config))
    assert capsys.readouterr().err == f"note: {refine.caution}\n"
    assert _figures(config, refine, CPU)["caution"] == refine.caution
    assert "caution" not in _figures(config, tiny.coarse, CPU)
    alone = replace(config, sequential=True)
    assert _cautions(alone) == []
    assert "caution" not in _figures(alone, refine, CPU)


# -- exact and resumable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_both_stages_at_tolerance_0_are_bitwise_the_sequential_ones(
    tmp_path: Path, tiny: Magic3DConfig, alone: TextTo3DConfig, window: int
) -> None:
    """Through lit and unlit steps, while the number of the mesh's vertices changes."""
    config = run_of(tmp_path, tiny, window=window, tolerance=0.0)
    train(config, time.time())
    assert_same(config, alone)
    stages = [RunRecord.load(each) for each in RunFolder(tmp_path).begun()]
    assert [stage.step for stage in stages] == [5, 8]
    assert all(stage.drift_evaluations > stage.step for stage in stages)  # they did look ahead


@pytest.mark.slow
def test_two_processes_make_the_same(
    tmp_path: Path, tiny: Magic3DConfig, alone: TextTo3DConfig, pools: Pools
) -> None:
    config = run_of(tmp_path, tiny, workers=2, tolerance=0.0)
    pools(2).run(train, config, time.time())
    assert_same(config, alone)


@pytest.mark.parametrize("at", [0, 3])
def test_the_refinement_is_resumed_bitwise(
    tmp_path: Path, tiny: Magic3DConfig, alone: TextTo3DConfig, at: int
) -> None:
    """Before its first step, whose mesh is then made again of the coarse scene, and in the middle."""
    config = run_of(tmp_path, tiny, window=3, tolerance=0.0)
    with stopped(Refine, at):
        train(config, time.time())
    begun = [RunRecord.load(each).step for each in RunFolder(tmp_path).begun()]
    assert begun == ([5, at] if at else [5])
    train(replace(config, window=2), time.time(), resume=True)
    assert_same(config, alone)


# -- what the stages do ----------------------------------------------------------------------------------


def test_the_number_of_vertices_changes_and_that_of_parameters_does_not(
    alone: TextTo3DConfig,
) -> None:
    coarse, refined = (load_scene(each.scene) for each in RunFolder(alone.out).begun())
    assert isinstance(refined, Tetrahedral)
    torch.manual_seed(0)
    begun = Tetrahedral.from_scene(refined.config, coarse)
    with torch.no_grad():
        before, after = begun.triangles(), refined.triangles()
    assert before.vertices.shape != after.vertices.shape
    pairs = zip(begun.parameters(), refined.parameters(), strict=True)
    assert all(one.shape == other.shape for one, other in pairs)


def test_the_losses_on_the_mesh_count_with_their_weights(
    alone: TextTo3DConfig, tiny: Magic3DConfig
) -> None:
    coarse = load_scene(RunFolder(alone.out).begun()[0].scene)
    stage = build_problem(tiny.refine, TASK, Path("none"), CPU, 1, coarse)
    torch.manual_seed(0)
    found = stage.loss(0)
    terms = found.terms
    assert terms.keys() == {"sds", "normal_consistency", "laplacian"}
    expected = terms["sds"] + 3 * terms["normal_consistency"] + 2 * terms["laplacian"]
    torch.testing.assert_close(found.total, expected)
    found.total.backward()
    for parameters in stage.scene.groups().values():
        assert all(each.grad is not None and each.grad.any() for each in parameters)


def test_an_empty_field_keeps_the_coarse_stage(tmp_path: Path, tiny: Magic3DConfig) -> None:
    """Which is exported, or gone on with: there is still nothing in it then."""
    field: Any = tiny.coarse.scene
    empty = replace(
        tiny,
        coarse=replace(
            tiny.coarse, steps=1, scene=replace(field, blob_scale=-90.0, blob_radius=9.0)
        ),
    )
    config = run_of(tmp_path, empty)
    with pytest.raises(
        ValueError, match=r"^stage 'refine' cannot begin: the scene before is empty"
    ):
        train(config, time.time())
    (coarse,) = RunFolder(tmp_path).begun()
    assert coarse.scene.is_file()
    with pytest.raises(ValueError, match=r"picardopt resume"):
        resume(load_config(RunFolder(tmp_path).config))


# -- presets ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_settings_run_two_sweeps_of_each_stage(folders: dict[str, Path]) -> None:
    previous = None
    for _, config in published(folders).stages():
        stage = build_problem(config, TASK, Path("none"), CPU, 0, previous)
        before = [parameter.detach().clone() for parameter in stage.scene.parameters()]
        optimizer = make_optimizer(stage, PicardOptions(config.picard), config.steps, 0)
        closure = closure_of(stage)
        while optimizer.stats.sweeps < 3:  # the step that begins the third one
            assert optimizer.step(closure).total.isfinite()
        assert optimizer.window == 7
        pairs = zip(before, stage.scene.parameters(), strict=True)
        assert not any(torch.equal(one, other) for one, other in pairs)
        previous = stage.scene


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or so on a core of its own
def test_the_small_preset_refines_the_chair(tmp_path: Path) -> None:
    config = replace(run_of(tmp_path, SMALL, sequential=True), preset="small")
    train(config, time.time())
    stages = [load_scene(each.scene) for each in RunFolder(tmp_path).begun()]
    coarse, refined = (psnr_against_truth(scene, CHAIR, 64) for scene in stages)
    assert coarse > 20
    assert refined > coarse
