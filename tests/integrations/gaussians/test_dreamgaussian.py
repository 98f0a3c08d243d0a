"""The recipes on 3D Gaussians: their losses and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras
from picardopt_3d.command import parse
from picardopt_3d.methods import METHODS, Stage
from picardopt_3d.methods.dreamgaussian import PAPER, PAPER_IMAGE, DreamGaussianWeights
from picardopt_3d.methods.zero123 import Zero123Weights
from picardopt_3d.scenes import Gaussians
from picardopt_3d.world.pictures import true_reference
from torch import Tensor

from tests.integrations.helpers.recipes import (
    CHAIR,
    FEW,
    RATES,
    build,
    save_pipelines,
    tiny,
    tiny_text,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("command", ["text-to-3d", "image-to-3d"])
def test_the_loss_is_the_weighted_sum_of_its_terms(
    command: str, step: int, folders: dict[str, Path]
) -> None:
    """Of a whole batch; from a picture with the comparison at the picture's camera, once a step."""
    config = tiny(command, "dreamgaussian", folders)
    stage = build(config)
    torch.manual_seed(step)
    found = stage.loss(step)

    torch.manual_seed(step)
    batch, size, large = (2, 6, 8) if step < 3 else (3, 8, 10)
    cameras = random_cameras(batch, config.cameras)
    shades = (torch.rand(batch, 1) >= 0.5).float()
    render = stage.scene.render(cameras, size, background=shades.expand(-1, 3))
    levels = config.timesteps.at(step, config.steps)
    expected = sds = stage.guidance(render.rgb, stage.prompt, cameras, levels)
    names = {"sds"}
    if command == "image-to-3d":
        reference = orbit_cameras(20.0, 30.0)
        front = stage.scene.render(reference, large, background=torch.ones(1, 3))
        rgb, alpha = true_reference(CHAIR, reference, 32).at(large)
        expected = sds + 10.0 * step * F.mse_loss(front.rgb[0], rgb)
        expected = expected + 5.0 * F.mse_loss(front.opacity[0], alpha)
        names = {"sds", "rgb", "mask"}
    torch.testing.assert_close(found.total, expected)
    assert found.terms.keys() == names
    views = found.aux["views"]
    assert views.max() == batch + (command == "image-to-3d")


@pytest.mark.parametrize("command", ["text-to-3d", "image-to-3d"])
def test_a_step_at_which_nothing_has_a_weight_has_no_gradient(
    command: str, folders: dict[str, Path]
) -> None:
    """As one at which weights that grow from 0 begin."""
    config = tiny(command, "dreamgaussian", folders)
    growing = ((0, 0.0), (9, 90.0))
    weights = {"sds": growing, "rgb": growing if command == "image-to-3d" else 0.0}
    stage = build(replace(config, weights=DreamGaussianWeights(**weights)))  # type: ignore[arg-type, call-arg]
    torch.manual_seed(0)
    found = stage.loss(0)
    assert found.total == 0
    found.total.backward()
    for name, parameter in stage.scene.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
    stage.scene.zero_grad()
    stage.loss(1).total.backward()
    assert (stage.scene.means.grad != 0).any()  # type: ignore[union-attr]


def seen_by_guidance(
    stage: Stage, see: Callable[[Tensor, Cameras, tuple[float, float]], None]
) -> None:
    """Shows what the stage hands to its guidance, which works as before."""
    real = stage.guidance

    class Seen:
        def __call__(
            self, views: Tensor, prompt: Any, cameras: Cameras, levels: tuple[float, float]
        ) -> Tensor:
            see(views.detach(), cameras, levels)
            return real(views, prompt, cameras, levels)

    stage.guidance = Seen()  # type: ignore[assignment]


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_each_view_of_each_step_has_a_black_or_a_white_background(
    probability: float, folders: dict[str, Path]
) -> None:
    stage = build(tiny_text(folders, black_background=probability, pixels=9, batch=4))
    assert isinstance(stage.scene, Gaussians)
    stage.scene.log_scales.data.fill_(-9.0)  # nothing reaches the corners
    corners: list[Tensor] = []
    seen_by_guidance(stage, lambda views, *_: corners.append(views[:, :, 0, 0]))
    for step in range(6):
        torch.manual_seed(step)
        stage.loss(step)
    shades = torch.stack(corners)
    assert ((shades == 0) | (shades == 1)).all()
    assert (shades == shades[..., :1]).all()
    black = (shades[..., 0] == 0).float()
    if probability == 0.5:
        assert 4 < black.sum() < 20
        assert black.std(dim=0).max() > 0  # over steps
        assert black.std(dim=1).max() > 0  # within one
    else:
        assert (black == probability).all()


def test_the_noise_level_falls_with_the_step(folders: dict[str, Path]) -> None:
    """One level for all views of a step: 1 - step / steps, as a fraction of the schedule, clipped."""
    for config in (PAPER, PAPER_IMAGE):
        levels = [config.timesteps.at(step, config.steps) for step in (0, 10, 125, 250, 490, 499)]
        low, high = zip(*levels, strict=True)
        assert low == high == pytest.approx((0.98, 0.98, 0.75, 0.5, 0.02, 0.02))
    stage = build(tiny_text(folders, timesteps=PAPER.timesteps))
    seen: list[tuple[float, float]] = []
    seen_by_guidance(stage, lambda _views, _cameras, levels: seen.append(levels))
    for step in range(9):
        stage.loss(step)
    assert [low for low, _ in seen] == pytest.approx(
        [0.98, *(1 - step / 9 for step in range(1, 9))]
    )


def test_the_comparison_with_the_picture_gains_weight_with_the_step() -> None:
    weights = {step: PAPER_IMAGE.weights.at(step) for step in (0, 1, 250, 500)}
    assert weights[0] == {"sds": 1.0}
    assert weights[1] == pytest.approx({"sds": 1.0, "rgb": 20.0, "mask": 2.0})
    assert weights[250] == pytest.approx({"sds": 1.0, "rgb": 5e3, "mask": 5e2})
    assert weights[500] == pytest.approx({"sds": 1.0, "rgb": 1e4, "mask": 1e3})
    assert PAPER.weights.at(250) == {"sds": 1.0}


def test_the_picture_pulls_its_own_side_whatever_the_batch(folders: dict[str, Path]) -> None:
    """The released code keeps this part of the loss only without a batch of views."""
    config = tiny("image-to-3d", "dreamgaussian", folders)
    for batch in (1, 4):
        stage = build(replace(config, batch=batch, weights=replace(config.weights, sds=0.0)))  # type: ignore[attr-defined, call-arg]
        torch.manual_seed(0)
        stage.loss(5).total.backward()
        assert isinstance(stage.scene, Gaussians)
        assert stage.scene.colours.grad is not None
        assert stage.scene.colours.grad.abs().max() > 0


# -- Zero-1-to-3 on Gaussians --------------------------------------------------------------------------------


def test_zero123_on_gaussians_has_no_losses_on_normals_in_space(folders: dict[str, Path]) -> None:
    config = tiny("image-to-3d", "zero123-gaussians", folders)
    for preset in METHODS["image-to-3d"]["zero123-gaussians"].presets.values():
        weights: Any = preset.weights  # type: ignore[attr-defined]
        assert weights.normal_smoothness_3d == weights.orientation == 0
        terms = build(replace(config, weights=weights)).loss(1).terms  # type: ignore[call-arg]
        assert terms.keys() == {"sds", "rgb", "mask", "sparsity", "opaque"}


def test_losses_on_normals_in_space_are_refused_in_one_line(folders: dict[str, Path]) -> None:
    config = tiny("image-to-3d", "zero123-gaussians", folders)
    with pytest.raises(ValueError, match=r"weights\.normal_smoothness_3d=8\.0: 3D Gau") as caught:
        replace(config, weights=Zero123Weights())  # type: ignore[call-arg]
    assert "\n" not in str(caught.value)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"black_background": 1.5}, "black_background=1.5: give a number from 0 to 1"),
        ({"reference_pixels": ((3, 8),)}, r"reference_pixels=\(\(3, 8\),\): .*from step 0"),
        ({"geometric": ("mean",)}, "geometric='mean': give names of rates: means,"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_text(folders, **options)


def test_a_scene_without_its_rates_names_them(folders: dict[str, Path]) -> None:
    rates = {name: rate for name, rate in RATES.items() if name != "harmonics"}
    build(tiny_text(folders, rates=rates))
    with pytest.raises(ValueError, match="give a rate for the scene's harmonics too"):
        build(tiny_text(folders, rates=rates, scene=replace(FEW, degree=1)))


def test_colours_that_depend_on_the_side_are_one_option_of_the_command(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    said = [
        "--method",
        "dreamgaussian",
        "--recipe.gaussians.scene.degree",
        "1",
        "--out",
        str(tmp_path),
    ]
    given = parse("text-to-3d", ["a red cube", *said], "").recipe.gaussians
    said += ["--recipe.gaussians.rates.harmonics", "0.25"]
    other = parse("text-to-3d", ["a red cube", *said], "").recipe.gaussians
    rates = (given.rates["harmonics"], other.rates["harmonics"])
    assert rates == (given.rates["colours"] / 20, 0.25)
    stage = build(tiny_text(folders, scene=replace(FEW, degree=1), rates=given.rates))
    before = stage.scene.harmonics.detach().clone()  # type: ignore[union-attr]
    stage.loss(0).total.backward()
    stage.optimizers()[0].step()
    assert (stage.scene.harmonics != before).any()  # type: ignore[union-attr]
