"""What each recipe asks of a step, and that its steps can be looked ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import orbit_cameras, random_cameras
from picardopt_3d.guidance import ScoreDistillation
from picardopt_3d.guidance.choose import GuidanceConfig, load_score
from picardopt_3d.methods import METHODS, Context, losses
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.zero123 import Zero123Weights
from picardopt_3d.tolerances import build_tolerance
from picardopt_3d.world.pictures import true_reference
from torch.utils import _pytree as pytree

from tests.integrations.helpers.recipes import (
    CHAIR,
    CPU,
    OF_ONE_STAGE,
    ahead,
    build,
    count_of,
    save_pipelines,
    sequential,
    shrunk,
    small,
    tiny,
    wrapped,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


# -- losses, against few-line formulas ------------------------------------------------------------------------


def test_losses_are_those_of_their_formulas() -> None:
    opacity = torch.tensor([0.0, 0.3, 1.0, 0.5]).view(1, 1, 2, 2).requires_grad_()
    expected = sum((x * x + 0.01) ** 0.5 for x in (0.0, 0.3, 1.0, 0.5)) / 4
    assert losses.sparsity(opacity).item() == pytest.approx(expected)
    value = opacity.detach().clamp(1e-3, 1 - 1e-3)
    entropy = -(value * value.log() + (1 - value) * (1 - value).log()).mean()
    assert losses.opaqueness(opacity).item() == pytest.approx(entropy.item())
    (slope,) = torch.autograd.grad(losses.opaqueness(opacity), opacity)
    assert slope[0, 0, 0, 1] > 0 > -slope[0, 0, 0, 1]  # 0.3 is pushed down to 0
    normal = torch.arange(2 * 3 * 2 * 3).view(2, 3, 2, 3).float()  # 1 across, 3 down
    assert losses.image_smoothness(normal).item() == 1 + 9


@pytest.mark.parametrize("step", [0, 4])
def test_dreamfusions_loss_is_the_weighted_sum_of_its_terms(
    step: int, folders: dict[str, Path]
) -> None:
    config = replace(tiny("text-to-3d", "dreamfusion", folders), random_background=0.0)
    config = replace(config, shading=ShadingConfig(diffuse_probability=0.0))  # type: ignore[call-arg]
    stage = build(config)
    torch.manual_seed(step)
    found = stage.loss(step)

    torch.manual_seed(step)
    batch, size = (2, 6) if step < 3 else (3, 8)
    cameras = random_cameras(batch, config.cameras)
    render = stage.scene.render(cameras, size, jitter=True, normals=True, step=step)
    sds = stage.guidance(render.rgb, stage.prompt, cameras, (0.02, 0.98))
    sparsity = (render.opacity**2 + 0.01).sqrt().mean()
    assert render.orientation_penalty is not None
    expected = sds + sparsity + (1.0 + step) * render.orientation_penalty
    torch.testing.assert_close(found.total, expected)
    assert ("occupancy" in found.aux) == (step % 2 == 0)


def test_textmeshs_loss_is_score_distillation_and_unit_gradients(folders: dict[str, Path]) -> None:
    stage = build(tiny("text-to-3d", "textmesh", folders))
    torch.manual_seed(0)
    found = stage.loss(0)

    torch.manual_seed(0)
    cameras = random_cameras(2)
    render = stage.scene.render(cameras, 6, jitter=True, normals=True, step=0)
    sds = stage.guidance(render.rgb, stage.prompt, cameras, (0.02, 0.98))
    assert render.eikonal is not None
    torch.testing.assert_close(found.total, sds + 2.0 * render.eikonal)
    torch.testing.assert_close(found.terms["eikonal"], render.eikonal)


@pytest.mark.parametrize("step", [0, 4])
def test_zero123s_loss_is_the_weighted_sum_of_both_renders(
    step: int, folders: dict[str, Path]
) -> None:
    config = tiny("image-to-3d", "zero123", folders)
    stage = build(config)
    torch.manual_seed(step)
    found = stage.loss(step)

    torch.manual_seed(step)
    batch, size, large = (2, 6, 8) if step < 3 else (3, 8, 10)
    both: dict[str, Any] = {
        "jitter": True,
        "normals": True,
        "normal_smoothness": True,
        "step": step,
    }
    cameras, reference = random_cameras(batch, config.cameras), orbit_cameras(20.0, 30.0)
    around = stage.scene.render(cameras, size, **both)
    levels = config.timesteps.at(step, config.steps)
    sds = stage.guidance(around.rgb, stage.prompt, cameras, levels)
    front = stage.scene.render(reference, large, **both)
    rgb, alpha = true_reference(CHAIR, reference, 32).at(large)
    expected = 0.1 * sds + 0.1 * (around.opacity**2 + 0.01).sqrt().mean()
    expected = expected + 500 * F.mse_loss(front.rgb[0], rgb)
    expected = expected + 50 * F.mse_loss(front.opacity[0], alpha)
    for render in (around, front):
        assert render.normal is not None
        shown = (F.normalize(render.normal, dim=1) + 1) / 2 * render.opacity
        rows, columns = shown.diff(dim=-2), shown.diff(dim=-1)
        expected = expected + 8 * (rows.square().mean() + columns.square().mean())
        expected = expected + 8 * render.normal_smoothness + render.orientation_penalty
        sure = render.opacity.clamp(1e-3, 1 - 1e-3)
        entropy = -(sure * sure.log() + (1 - sure) * (1 - sure).log()).mean()
        expected = expected + 0.1 * entropy
    torch.testing.assert_close(found.total, expected)
    names = {"sds", "rgb", "mask", "sparsity", "opaque", "orientation"}
    assert found.terms.keys() == names | {"normal_smoothness", "normal_smoothness_3d"}
    assert found.aux.keys() == {"occupancy"}


def test_losses_without_a_weight_are_not_computed(folders: dict[str, Path]) -> None:
    weights = Zero123Weights(
        normal_smoothness=0, normal_smoothness_3d=0, orientation=0, sparsity=0, opaque=0
    )
    stage = build(replace(tiny("image-to-3d", "zero123", folders), weights=weights))  # type: ignore[call-arg]
    assert stage.loss(1).terms.keys() == {"sds", "rgb", "mask"}


def test_light_and_backgrounds_are_seen_in_the_loss(folders: dict[str, Path]) -> None:
    config = tiny("text-to-3d", "dreamfusion", folders)
    shading = ShadingConfig(ambient_steps=4, diffuse_probability=1.0, textureless_probability=1.0)
    found = []
    for changed in ({}, {"shading": shading}, {"random_background": 1.0}):
        plain = {"shading": ShadingConfig(), "random_background": 0.0} | changed
        stage = build(replace(config, **plain))  # type: ignore[arg-type]
        for step in (3, 4):
            torch.manual_seed(0)
            found.append(stage.loss(step).total.item())
    assert found[0] == found[2]  # not yet lit
    assert found[1] != found[3]
    assert found[0] != found[4]


def test_empty_space_is_known_before_the_first_step(folders: dict[str, Path]) -> None:
    """The whole first window is rendered before step 0 has measured anything."""
    for command, method in (("text-to-3d", "textmesh"), ("image-to-3d", "zero123")):
        grid = build(tiny(command, method, folders)).scene.occupancy
        assert grid is not None
        assert (grid.values >= 0).all()


def test_a_recipe_from_a_picture_needs_one(folders: dict[str, Path]) -> None:
    config = tiny("image-to-3d", "zero123", folders)
    score = load_score(config.guidance, CHAIR.caption, 8, CPU)
    with pytest.raises(ValueError, match=r"context\.image is None: give the picture"):
        config.build(
            Context(ScoreDistillation(score), config.guidance.text_prompt("a red chair"), CPU)
        )


# -- learning rates ----------------------------------------------------------------------------------------


def test_every_parameter_has_the_rate_of_its_group(folders: dict[str, Path]) -> None:
    config = METHODS["text-to-3d"]["textmesh"].presets["paper"]
    stage = build(replace(config, scene=small(config.scene), guidance=GuidanceConfig("exact")))
    (base,) = stage.optimizers()
    rates = {group["name"]: group["lr"] for group in base.param_groups}
    assert rates == {"encoding": 0.01, "networks": 0.001, "background": 0.001}
    held = [id(p) for group in base.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in stage.scene.parameters())
    assert base.defaults["betas"] == (0.9, 0.99)
    assert base.defaults["eps"] == 1e-15


# -- looking ahead -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "name"), OF_ONE_STAGE)
def test_at_tolerance_0_a_run_is_bitwise_the_sequential_one(
    command: str, name: str, folders: dict[str, Path]
) -> None:
    """Over milestones of batch and size, through lit and unlit steps, with what the scene carries and changes."""
    config = tiny(command, name, folders)
    alone, early = build(config), build(config)
    expected = list(sequential(alone, config.steps, 3))
    counts = []
    optimizer = wrapped(early, config.steps, 3, window=3, tolerance=0)
    for step, values in enumerate(ahead(early, optimizer, config.steps)):
        found, wanted = (pytree.tree_flatten(each) for each in (values, expected[step]))
        assert found[1] == wanted[1]
        for one, other in zip(found[0], wanted[0], strict=True):
            assert torch.equal(one, other), step
        counts.append(count_of(early))
    for one, other in zip(alone.scene.parameters(), early.scene.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(alone.scene.buffers(), early.scene.buffers(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.stats.drift_evaluations > config.steps  # it did look ahead
    if alone.restructure() is None:
        assert alone.scene.occupancy is not None
        assert alone.scene.occupancy.values.min() >= 0  # it was measured
    else:
        assert len(set(counts)) > 2  # Gaussians came and went


QUICK = {"zero123", "zero123-gaussians"}
PAPER = [
    pytest.param(command, method, name, marks=[] if method in QUICK else [pytest.mark.slow])
    for command, methods in METHODS.items()
    for method, entry in methods.items()
    for name in entry.presets
    if name.startswith("paper") and (command, method) in OF_ONE_STAGE
]


@pytest.mark.parametrize(("command", "method", "name"), PAPER)
def test_published_settings_run_two_sweeps_on_the_real_pipelines(
    command: str, method: str, name: str, folders: dict[str, Path]
) -> None:
    config = shrunk(METHODS[command][method].presets[name], folders)
    stage = build(config)
    before = [parameter.detach().clone() for parameter in stage.scene.parameters()]
    picard = config.picard
    rule = build_tolerance(picard.tolerance)
    optimizer = wrapped(
        stage, config.steps, 0, window=picard.window, predictor=picard.predictor, tolerance=rule
    )
    for values in ahead(stage, optimizer, config.steps):
        assert values.total.isfinite()
        if optimizer.stats.sweeps == 2:
            break
    assert optimizer.window == 7
    moved = [
        not torch.equal(one, other)
        for one, other in zip(before, stage.scene.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "method", "step"),
    [
        ("text-to-3d", "dreamfusion", 2001),
        ("text-to-3d", "dreamfusion", 9999),
        ("text-to-3d", "textmesh", 6000),
        ("image-to-3d", "zero123", 600),
        ("image-to-3d", "zero123", 1199),
        ("text-to-3d", "dreamgaussian", 300),
        ("image-to-3d", "dreamgaussian", 499),
        ("image-to-3d", "zero123-gaussians", 300),
    ],
)
def test_published_settings_make_a_step_at_any_time_of_the_run(
    command: str, method: str, step: int, folders: dict[str, Path]
) -> None:
    config = shrunk(METHODS[command][method].presets["paper"].stages()[0].config, folders)
    stage = build(config)
    torch.manual_seed(0)
    stage.loss(step).total.backward()
    for name, parameter in stage.scene.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
