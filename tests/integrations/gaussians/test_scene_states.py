"""States and files of Gaussians: another number of them is loaded, what does not fit changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.scenes import Gaussians, load_scene, save_scene

from tests.integrations.helpers.gaussian_scenes import AROUND, changed, optimizer_of, scene, take


@pytest.mark.parametrize("degree", [0, 2])
def test_a_file_brings_back_another_number_of_gaussians(tmp_path: Path, degree: int) -> None:
    made = scene(degree=degree)
    base = optimizer_of(made)
    change = made.restructure([base])
    for step in range(2):
        take(made, base, step, change)
    save_scene(made, tmp_path / "scene.safetensors")
    found = load_scene(tmp_path / "scene.safetensors")
    assert isinstance(found, Gaussians)
    assert found.config == made.config
    assert found.count == made.count != 20
    assert torch.equal(found.render(AROUND, 8).rgb, made.render(AROUND, 8).rgb)


def test_loading_another_number_keeps_the_optimizers_parameters() -> None:
    """A run is resumed by building it anew and loading: its optimizer must train what was loaded."""
    made, base = changed()
    saved = copy.deepcopy((made.state_dict(), base.state_dict()))
    fresh = scene(seed=1)
    again = optimizer_of(fresh)
    held = [id(group["params"][0]) for group in again.param_groups]
    take(fresh, again, 0)  # with states of the old number
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [id(group["params"][0]) for group in again.param_groups] == held
    assert [id(parameter) for parameter in fresh.parameters()] == held
    assert fresh.count == made.count
    for one, other, step in ((made, base, 2), (fresh, again, 2)):
        take(one, other, step)
    for name, value in made.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = changed()[0].state_dict()
    with pytest.raises(RuntimeError, match="harmonics"):
        scene(degree=1).load_state_dict(state)


@pytest.mark.parametrize("count", [20, 30])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda state: state.pop("colours"), "colours"),
        (lambda state: state.update(harmonics=state["colours"][:, None]), "harmonics"),
        (lambda state: state.update(rotations=state["rotations"][:, :3]), "rotations"),
        (lambda state: state.update(opacity_logits=state["opacity_logits"][1:]), "opacity_logits"),
        (lambda state: state.update({"statistics.radii": torch.zeros(3)}), "radii"),
        (lambda state: state.update(means=torch.zeros(())), "means"),
    ],
    ids=["missing", "unknown", "narrower", "shorter", "another number", "a number"],
)
def test_a_refused_state_changes_nothing(count: int, broken: Any, named: str) -> None:
    """Neither the number of Gaussians nor a single one of them."""
    made, base = scene(), scene(seed=1, count=count)
    optimizer = optimizer_of(made)
    take(made, optimizer, 0)
    before, state = copy.deepcopy(made.state_dict()), base.state_dict()
    parameters = {name: (id(p), p.grad) for name, p in made.named_parameters()}
    broken(state)
    with pytest.raises(RuntimeError, match=named) as caught:
        made.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert {name: (id(p), p.grad) for name, p in made.named_parameters()} == parameters
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name
    take(made, optimizer, 1)


def test_a_part_of_a_state_is_loaded_if_that_is_asked_for() -> None:
    """As torch has it, for the same number of Gaussians; another number needs all of them."""
    made, other = scene(), scene(seed=1)
    part = {"means": other.state_dict()["means"], "more": torch.zeros(2)}
    made.load_state_dict(part, strict=False)
    assert torch.equal(made.means, other.means)
    assert not torch.equal(made.colours, other.colours)
    with pytest.raises(RuntimeError, match="colours"):
        made.load_state_dict({"means": scene(count=30).means}, strict=False)
    assert made.count == 20
