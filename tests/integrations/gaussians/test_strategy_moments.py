"""New Gaussians take values and the optimizers' moments from their parents."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import Statistics
from picardopt_3d.scenes.gaussians.strategy import densify_and_prune, reset_opacities
from torch import Tensor, nn

from tests.helpers.gaussians import draw_parameters
from tests.helpers.runs import assert_same_bits, differences
from tests.helpers.trained_gaussians import (
    CONFIG,
    LAYOUTS,
    OPTIMIZERS,
    in_groups,
    saved,
    statistics_of,
    trained,
)


def by_hand(values: dict[str, Tensor], seen: Statistics, config: StrategyConfig) -> list[list[int]]:
    """Who stays, who is duplicated and who is split, one Gaussian after the other."""
    visible, wanted = [], []
    opacity = config.least_opacity
    least = torch.tensor(math.log(opacity / (1 - opacity)) if opacity else -math.inf)
    for i in range(len(values["means"])):
        if values["opacity_logits"][i] >= least:
            visible.append(i)
            views = int(seen.views[i])
            pull = float(seen.gradients[i] / views) if views else math.nan
            size = float(values["log_scales"][i].exp().max())
            if math.isfinite(pull) and math.isfinite(size) and pull >= config.gradient:
                wanted.append((-pull, i))
    chosen = {i for _, i in sorted(wanted)[: max(0, config.most - len(visible))]}
    kinds: list[list[int]] = [[], [], []]
    for i in visible:
        size, radius = float(values["log_scales"][i].exp().max()), float(seen.radii[i])
        split = i in chosen and size > config.split_scale
        if split:
            size, radius = size / 1.6, radius / 1.6
        if config.largest_scale is not None and size > config.largest_scale:
            continue
        if config.largest_radius is not None and radius > config.largest_radius:
            continue
        if split:
            kinds[2].append(i)
            continue
        kinds[0].append(i)
        if i in chosen:
            kinds[1].append(i)
    return kinds


numbers = st.floats(0, 1, width=32)
configs = st.builds(
    StrategyConfig,
    gradient=numbers,
    split_scale=numbers,
    least_opacity=st.floats(0, 0.9),
    largest_scale=st.none() | st.floats(0.05, 2),
    largest_radius=st.none() | st.floats(0.05, 2),
    most=st.integers(1, 30),
)
odd = st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@given(
    st.integers(1, 12),
    configs,
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from(["gradients", "scale", "opacity"]), odd)
    ),
)
def test_rows_and_moments_are_those_of_the_parents(
    count: int, config: StrategyConfig, optimizer: str, layout: str, seed: int, spoiled: Any
) -> None:
    parameters, optimizers = trained(count, optimizer, layout, seed)
    seen = statistics_of(count, seed)
    with torch.no_grad():
        for row, what, value in spoiled:
            targets = {
                "gradients": seen.gradients,
                "scale": parameters["log_scales"],
                "opacity": parameters["opacity_logits"],
            }
            targets[what][row % count] = value
    before, states = saved(parameters, optimizers)
    groups = [[dict(group, params=None) for group in o.param_groups] for o in optimizers]
    places = [in_groups(o) for o in optimizers]
    names = {id(parameter): name for name, parameter in parameters.items()}
    staying, copied, split = by_hand(before, seen, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parents = densify_and_prune(parameters, optimizers, seen, config)

    if not staying and not split:  # nothing is left: the most opaque one stays
        opacity = before["opacity_logits"].nan_to_num(nan=-math.inf)
        staying = [int(opacity.argmax())]
    assert parents.dtype == torch.int64
    assert parents.tolist() == [*staying, *copied, *split, *split]
    assert 1 <= len(parents) <= max(count, config.most)
    first, halves = len(staying), len(staying) + len(copied)
    after, new_states = saved(parameters, optimizers)
    assert list(after) == list(before)
    for name, value in after.items():
        from_parents = before[name][parents]
        if name == "log_scales":
            from_parents[halves:] -= math.log(1.6)
        same = slice(0, halves if name == "means" else len(parents))
        assert_same_bits(value[same], from_parents[same])
        for key, was in states[name].items():
            now = new_states[name][key]
            if isinstance(was, Tensor) and was.shape == before[name].shape:
                taken = len(parents) if key == "step_size" else first
                assert_same_bits(now[:taken], was[parents[:taken]])
                assert not now[taken:].any()
            else:
                assert_same_bits(now, was)
    # Every group holds the new parameters in the old places, and nothing of the old ones is left.
    for each, place, group in zip(optimizers, places, groups, strict=True):
        assert all(
            p is parameters[names[id(q)]] for p, q in zip(in_groups(each), place, strict=True)
        )
        assert {id(p) for p in each.state} <= {id(p) for p in in_groups(each)}
        assert [dict(g, params=None) for g in each.param_groups] == group
        assert not {id(p) for p in in_groups(each)} & {id(q) for q in place}
    for each in optimizers:  # and they go on
        for p in in_groups(each):
            p.grad = torch.ones_like(p)
        each.step()


def test_equals_gsplat() -> None:
    """Its DefaultStrategy on Adam, where it has no fault: values, order, draws and moments."""
    gsplat = pytest.importorskip("gsplat.strategy")
    count, names = 60, {"log_scales": "scales", "rotations": "quats", "opacity_logits": "opacities"}
    parameters, optimizers = trained(count, "Adam", "one each")
    seen = statistics_of(count)
    theirs = {names.get(n, n): nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    their_optimizers = {}
    for (name, old), owner in zip(parameters.items(), optimizers, strict=True):
        name = names.get(name, name)
        their_optimizers[name] = torch.optim.Adam([theirs[name]])
        their_optimizers[name].state[theirs[name]] = copy.deepcopy(owner.state[old])
    config = replace(CONFIG, largest_radius=None)
    reference = gsplat.DefaultStrategy(
        prune_opa=config.least_opacity,
        grow_grad2d=config.gradient,
        grow_scale3d=config.split_scale,
        prune_scale3d=config.largest_scale,
    )
    state = {"grad2d": seen.gradients.clone(), "count": seen.views.clone(), "scene_scale": 1.0}
    # It draws for the transparent ones too, which it removes afterwards; there are none of these here.
    with torch.no_grad():
        for each in (parameters["opacity_logits"], theirs["opacities"]):
            each.abs_()
    torch.manual_seed(1)
    copies, splits = reference._grow_gs(theirs, their_optimizers, state, step=10_000)
    removed = reference._prune_gs(theirs, their_optimizers, state, step=10_000)
    torch.manual_seed(1)
    parents = densify_and_prune(parameters, optimizers, seen, replace(config, largest_scale=None))
    assert min(copies, splits) > 5
    assert len(parents) == count + copies + splits
    if removed:  # by size, after the draws in both
        small = parameters["log_scales"].exp().amax(1) <= config.largest_scale
        assert int((~small).sum()) == removed
    else:
        small = torch.ones(len(parents), dtype=torch.bool)
    for name, parameter in parameters.items():
        other = theirs[names.get(name, name)]
        assert torch.allclose(parameter[small], other, atol=1e-6)
        (owner,) = (o for o in optimizers if any(p is parameter for p in in_groups(o)))
        for key, value in their_optimizers[names.get(name, name)].state[other].items():
            own = owner.state[parameter][key]
            assert_same_bits(own[small] if own.ndim else own, value)


def test_new_gaussians_keep_their_parents_step_sizes() -> None:
    """Rprop's: a size of 0 would hardly let them move."""
    parameters, (optimizer,) = trained(4, "Rprop")
    with torch.no_grad():
        parameters["opacity_logits"].fill_(1.0)
        parameters["log_scales"].fill_(-5.0)
    before = optimizer.state[parameters["means"]]["step_size"].clone()
    seen = Statistics(torch.ones(4), torch.ones(4), torch.zeros(4))
    parents = densify_and_prune(parameters, [optimizer], seen, CONFIG)
    after = optimizer.state[parameters["means"]]
    assert_same_bits(after["step_size"], before[parents])
    assert not after["prev"][4:].any()
    reset_opacities(parameters, [optimizer], CONFIG)
    assert (optimizer.state[parameters["opacity_logits"]]["step_size"] > 0).all()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_factored_moments_go_along_where_they_have_rows(count: int) -> None:
    """Adafactor keeps one number a row and one a column: of one Gaussian, the latter have as many rows as it has."""
    parameters = draw_parameters(count)
    own = {name: parameters[name] for name in ("means", "log_scales", "opacity_logits")}
    with torch.no_grad():
        own["opacity_logits"].fill_(1.0)
        own["log_scales"].fill_(-5.0)
    optimizer = torch.optim.Adafactor([own["means"], own["log_scales"]])
    sum(p.square().sum() for p in own.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    before = copy.deepcopy(dict(optimizer.state[own["means"]]))
    seen = Statistics(torch.ones(count), torch.ones(count), torch.zeros(count))
    parents = densify_and_prune(own, [optimizer], seen, CONFIG)
    assert parents.tolist() == [*range(count), *range(count)]
    after = optimizer.state[own["means"]]
    assert_same_bits(after["col_var"], before["col_var"])
    assert_same_bits(after["row_var"][:count], before["row_var"])
    assert not after["row_var"][count:].any()
    sum(p.square().sum() for p in own.values()).backward()  # type: ignore[union-attr]
    optimizer.step()


def test_opacities_are_lowered_and_their_moments_zeroed() -> None:
    parameters, optimizers = trained(9, "amsgrad", "one group")
    config = replace(CONFIG, reset_every=5, reset_opacity=0.4)
    before, states = saved(parameters, optimizers)
    reset_opacities(parameters, optimizers, config)
    after, new_states = saved(parameters, optimizers)
    limit = math.log(0.4 / 0.6)
    assert (before["opacity_logits"] > limit).any()
    assert (before["opacity_logits"] < limit).any()
    assert_same_bits(after["opacity_logits"], before["opacity_logits"].clamp(max=limit))
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert states["opacity_logits"][key].any()
        assert not new_states["opacity_logits"][key].any()
    assert_same_bits(new_states["opacity_logits"]["step"], states["opacity_logits"]["step"])
    for name in set(after) - {"opacity_logits"}:
        assert_same_bits([after[name], new_states[name]], [before[name], states[name]])
    assert any(p is parameters["opacity_logits"] for p in in_groups(optimizers[0]))


def test_frozen_parameters_stay_frozen_and_need_no_optimizer() -> None:
    parameters, _ = trained(6)
    parameters["rotations"].requires_grad_(False)
    others = [p for name, p in parameters.items() if name != "rotations"]
    optimizer = torch.optim.Adam(others)
    densify_and_prune(parameters, [optimizer], statistics_of(6), CONFIG)
    assert not parameters["rotations"].requires_grad
    assert all(p.requires_grad for name, p in parameters.items() if name != "rotations")


def test_a_failure_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without picardopt's own undoing: all is computed before the first parameter is replaced."""
    parameters, optimizers = trained(20)
    before, old = saved(parameters, optimizers), dict(parameters)
    monkeypatch.setattr(torch, "randn", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        densify_and_prune(parameters, optimizers, statistics_of(20), CONFIG)
    assert parameters == old
    assert in_groups(optimizers[0]) == list(old.values())
    assert_same_bits(saved(parameters, optimizers), before)


def test_the_comparison_of_moments_can_fail() -> None:
    parameters, optimizers = trained(3)
    before = saved(parameters, optimizers)
    optimizers[0].state[parameters["means"]]["exp_avg"][0, 0] += 1
    assert list(differences(saved(parameters, optimizers), before))
