"""Recipes of several stages: seeds, conversion of scenes, and resuming in the second stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.guidance.choose import GuidanceConfig, load_guidance
from picardopt_3d.methods import METHODS, Context, Stage, StageConfig, stage_seed
from picardopt_3d.methods.dreamfusion import DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import check_rates
from picardopt_3d.problem import Losses, Problem
from picardopt_3d.scenes import (
    FieldConfig,
    GaussiansConfig,
    HashConfig,
    NerfConfig,
    OccupancyConfig,
    Scene,
    SceneConfig,
    SdfConfig,
    build_scene,
    check_conversion,
    trained_groups,
)
from picardopt_3d.scenes.files import KINDS
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig

from picardopt import ParallelPicardOptimizer, load_checkpoint, save_checkpoint
from tests.integrations.helpers.analytic import Balls, voxels
from tests.integrations.helpers.two_stages import TwoStages

CPU = torch.device("cpu")
SMALL_HASH = HashConfig(levels=4, log2_size=12, base=8, scale=1.6)


def stage_config(pixels: int, scene: SceneConfig, **numbers: Any) -> DreamFusionConfig:
    return DreamFusionConfig(
        **({"steps": 5, "batch": 2, "pixels": pixels, "scene": scene} | numbers),
        guidance=GuidanceConfig("exact"),
        weights=DreamFusionWeights(orientation=0.0),
        shading=ShadingConfig(diffuse_probability=0.0),
    )


RECIPE = TwoStages(
    coarse=stage_config(8, FieldConfig(resolutions=(4, 8), samples=8)),
    fine=stage_config(
        12,
        NerfConfig(
            encoding=SMALL_HASH,
            width=8,
            radius=0.55,
            samples=8,
            background="solid",
            occupancy=OccupancyConfig(resolution=4, every=2),
        ),
        rates={"encoding": ((0, 0.02), (4, 0.005)), "networks": 0.01},
    ),
)


def build(config: StageConfig, index: int, previous: Scene | None) -> Stage:
    guidance = load_guidance(config.guidance, "a red cube", config.final_pixels, CPU)
    context = Context(guidance, config.guidance.text_prompt("a red cube"), CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(3, index))
        return config.build(context, previous)


class Run:
    """One stage and its optimizer, as a run loop holds them; a checkpoint is all that goes on."""

    def __init__(self, config: StageConfig, index: int, previous: Scene | None) -> None:
        self.stage = build(config, index, previous)
        problem: Problem = self.stage
        self.scheduler = problem.lr_scheduler()
        self.optimizer = ParallelPicardOptimizer(
            problem.optimizers(),
            measured=problem.measured(),
            carry=problem.carry(),
            restructure=problem.restructure(),
            lr_scheduler=self.scheduler,
            total_steps=config.steps,
            seed=stage_seed(3, index),
            window=3,
            tolerance=0,
        )

    def go_on(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure())
            if self.scheduler is not None:
                self.scheduler.step()
        return self

    def closure(self) -> Callable[[int], Losses]:
        def closure(step: int) -> Losses:
            self.optimizer.zero_grad()
            losses = self.stage.loss(step)
            losses.total.backward()
            return losses

        return closure

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.stage.state_dict() | {"optimizer": self.optimizer.state_dict()})

    def load(self, path: Path) -> Run:
        state = load_checkpoint(path)
        self.stage.load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        return self


def same_bits(one: Scene, other: Scene) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# -- seeds and names -------------------------------------------------------------------------------------


def test_the_first_stage_has_the_runs_seed_and_others_have_their_own() -> None:
    assert [stage_seed(seed, 0) for seed in (0, 7)] == [0, 7]
    others = [stage_seed(seed, index) for seed in range(4) for index in range(1, 4)]
    assert len(set(others) | {0, 1, 2, 3}) == 16
    assert all(0 <= seed < 2**63 for seed in others)
    assert stage_seed(0, 1) == stage_seed(0, 1)


def test_a_recipe_of_one_stage_is_that_stage() -> None:
    configs = [
        config
        for methods in METHODS.values()
        for entry in methods.values()
        for config in entry.presets.values()
        if isinstance(config, StageConfig)
    ]
    assert configs
    for config in configs:
        ((_, only),) = config.stages()
        assert only is config


def test_the_stages_of_a_recipe_are_its_fields_in_order() -> None:
    assert [(name, config.final_pixels) for name, config in RECIPE.stages()] == [
        ("coarse", 8),
        ("fine", 12),
    ]


# -- two stages ------------------------------------------------------------------------------------------


def test_a_run_of_two_stages_resumes_in_the_second_one_bitwise(tmp_path: Path) -> None:
    (_, coarse), (_, fine) = RECIPE.stages()
    first = Run(coarse, 0, None).go_on(coarse.steps)
    whole = Run(fine, 1, first.stage.scene)
    begun = {name: value.clone() for name, value in whole.stage.scene.state_dict().items()}
    whole.go_on(fine.steps)
    assert whole.optimizer.stats.drift_evaluations > fine.steps  # it did run ahead

    stopped = Run(fine, 1, first.stage.scene)
    assert all(
        torch.equal(value, begun[name]) for name, value in stopped.stage.scene.state_dict().items()
    )
    stopped.go_on(2).save(tmp_path / "checkpoint.pt")
    for previous in (first.stage.scene, None):  # what the checkpoint holds does not depend on it
        again = Run(fine, 1, previous).load(tmp_path / "checkpoint.pt")
        assert again.optimizer.step_index == 2
        again.go_on(fine.steps - 2)
        assert same_bits(again.stage.scene, whole.stage.scene)
        rates = [group["lr"] for group in again.optimizer.param_groups]
        assert rates == [group["lr"] for group in whole.optimizer.param_groups]


def test_the_second_stage_begins_with_what_the_first_one_has_made() -> None:
    def shown(scene: Scene) -> torch.Tensor:
        with torch.no_grad():
            return scene.render(turntable_cameras(3), 24).rgb

    (_, _), (_, fine) = RECIPE.stages()
    object_ = voxels(lambda points: points.norm(dim=-1) - 0.3, (0.8, 0.1, 0.1))
    wanted = shown(object_)
    converted = (shown(build(fine, 1, object_).scene) - wanted).square().mean()
    fresh = (shown(build(fine, 1, None).scene) - wanted).square().mean()
    assert converted < 0.3 * fresh


def test_a_stage_of_the_same_shape_begins_with_the_same_bits() -> None:
    (_, coarse), _ = RECIPE.stages()
    first = Run(coarse, 0, None).go_on(2).stage.scene
    larger = replace(coarse, pixels=12)  # type: ignore[call-arg]
    assert same_bits(build(larger, 1, first).scene, first)


# -- conversion ------------------------------------------------------------------------------------------


SHAPES: dict[str, SceneConfig] = {
    "voxels": FieldConfig(resolutions=(16, 32), samples=24),
    "nerf": NerfConfig(
        encoding=SMALL_HASH, width=16, radius=0.55, samples=24, background="solid", occupancy=None
    ),
    "sdf": SdfConfig(
        encoding=replace(SMALL_HASH, start_level=None),
        width=16,
        radius=0.55,
        samples=24,
        surface_radius=0.4,
        background="neural",
        occupancy=None,
    ),
}


@pytest.mark.parametrize(
    "kind", ["voxels", pytest.param("nerf", marks=pytest.mark.slow), "sdf"]
)  # one test above begins with a NeRF
def test_fields_convert_into_each_other(kind: str) -> None:
    box = voxels(lambda points: points.abs().amax(-1) - 0.25, (0.1, 0.3, 0.9))
    cameras = turntable_cameras(3)
    torch.manual_seed(0)
    field = build_scene(SHAPES[kind], box)
    with torch.no_grad():
        wanted, found = box.render(cameras, 32), field.render(cameras, 32)
    assert (found.rgb - wanted.rgb).square().mean() < 10 ** (-2.2)
    assert (found.opacity - wanted.opacity).square().mean() < 10 ** (-2.2)


def test_what_does_not_convert_is_known_before_there_are_scenes() -> None:
    voxels_, gaussians = SHAPES["voxels"], GaussiansConfig()
    grid, textured = TetrahedralConfig(resolution=8), TexturedMeshConfig()
    for after, before in (
        *((SHAPES[one], SHAPES[other]) for one in SHAPES for other in SHAPES),
        *((gaussians, before) for before in (gaussians, *SHAPES.values())),
        *((grid, before) for before in (gaussians, *SHAPES.values(), grid)),
        *((textured, before) for before in (gaussians, *SHAPES.values(), grid, textured)),
    ):
        check_conversion(after, before)
    for after, before, said in (
        (voxels_, gaussians, "a Gaussians cannot be converted to a RadianceField"),
        (voxels_, grid, "a Tetrahedral cannot be converted to a RadianceField"),
        (grid, textured, "a TexturedMesh cannot be converted to a Tetrahedral"),
    ):
        with pytest.raises(TypeError, match=said):
            check_conversion(after, before)
    with pytest.raises(ValueError, match="resolution=8: the grid before has 9 cells"):
        check_conversion(grid, TetrahedralConfig(resolution=9))


@pytest.mark.parametrize("trained", ["all", "shape", "colour"])
@pytest.mark.parametrize("background", ["solid", "neural"])
def test_the_groups_of_a_scene_are_known_before_there_is_one(trained: Any, background: Any) -> None:
    configs: list[SceneConfig] = [
        FieldConfig(resolutions=(4, 8)),
        *(replace(SHAPES[kind], background=background) for kind in SHAPES if kind != "voxels"),
        *(GaussiansConfig(count=4, degree=degree) for degree in (0, 1)),
        TetrahedralConfig(
            resolution=8, radius=0.6, encoding=SMALL_HASH, trained=trained, background=background
        ),
        TexturedMeshConfig(resolution=12, faces=40, texture=16, view_pixels=16, trained=trained),
    ]
    for config in configs:
        other = Balls() if isinstance(config, TexturedMeshConfig) else None
        groups = build_scene(config, other).groups()
        assert trained_groups(config) == {name: bool(each) for name, each in groups.items()}
    assert {type(config) for config in configs} == {config for config, _ in KINDS.values()}


def test_every_preset_has_rates_for_its_scenes() -> None:
    for method in (method for methods in METHODS.values() for method in methods.values()):
        for recipe in method.presets.values():
            for _, stage in recipe.stages():
                check_rates(stage, trained_groups(stage.scene))


def test_what_does_not_convert_is_said_by_name() -> None:
    with pytest.raises(TypeError, match="a Balls cannot be converted to a NerfField"):
        build_scene(SHAPES["nerf"], Balls())
    with pytest.raises(TypeError, match="a RadianceField cannot be converted to a Balls"):
        Balls.from_scene(None, build_scene(SHAPES["voxels"]))
