"""Gaussians are duplicated, split and removed as the paper says, and take their optimizers' moments along."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.scenes.gaussians import strategy
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import Statistics
from picardopt_3d.scenes.gaussians.strategy import densify_and_prune, reset_opacities
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers.gaussians import draw_parameters
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits, differences

Parameters = dict[str, nn.Parameter]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "foreach": partial(torch.optim.AdamW, foreach=True),
    "fused": partial(torch.optim.AdamW, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
}
LAYOUTS: dict[str, Callable[[Parameters], list[list[dict[str, Any]]]]] = {
    "one group": lambda p: [[{"params": list(p.values())}]],
    "groups": lambda p: [[{"params": [each]} for each in p.values()]],
    "one each": lambda p: [[{"params": [each]}] for each in p.values()],
    "two": lambda p: [
        [{"params": list(p.values())[:2]}, {"params": list(p.values())[2:4]}],
        [{"params": list(p.values())[4:]}],
    ],
}
CONFIG = StrategyConfig(
    gradient=0.5, split_scale=0.4, least_opacity=0.3, largest_scale=0.7, largest_radius=0.7
)


def trained(
    count: int, optimizer: str = "Adam", layout: str = "groups", seed: int = 0
) -> tuple[Parameters, list[Optimizer]]:
    """Parameters after two steps of their optimizers."""
    parameters = draw_parameters(count, seed)
    optimizers = [OPTIMIZERS[optimizer](groups) for groups in LAYOUTS[layout](parameters)]
    for _ in range(2):
        sum(p.square().sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
        for each in optimizers:
            each.step()
    return parameters, optimizers


def statistics_of(count: int, seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 4, (count,), generator=generator)
    gradients = torch.rand(count, generator=generator) * views
    return Statistics(gradients, views, torch.rand(count, generator=generator))


def saved(parameters: Parameters, optimizers: Sequence[Optimizer]) -> tuple[Any, Any]:
    """Bits of all parameters and states, by name."""
    states: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        (owner,) = (o for o in optimizers if any(p is parameter for p in in_groups(o)))
        states[name] = dict(owner.state.get(parameter, {}))
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return copy.deepcopy(values), copy.deepcopy(states)


def in_groups(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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


def test_halves_are_drawn_from_the_gaussian() -> None:
    """20,000 times the same one, turned: the covariance of the halves' centres is its own."""
    count = 20_000
    parameters = {
        "means": nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).repeat(count, 1)),
        "log_scales": nn.Parameter(torch.tensor([0.5, 1.0, 0.1]).log().repeat(count, 1)),
        "rotations": nn.Parameter(torch.tensor([0.6, 0.0, 0.0, 1.6]).repeat(count, 1)),
        "opacity_logits": nn.Parameter(torch.zeros(count)),
    }
    seen = Statistics(torch.ones(count), torch.ones(count), torch.zeros(count))
    torch.manual_seed(0)
    parents = densify_and_prune(parameters, [], seen, replace(CONFIG, largest_scale=None))
    assert torch.equal(parents, torch.arange(count).repeat(2))
    angle = 2 * math.atan2(1.6, 0.6)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    drawn = parameters["means"].detach()
    covariance = turn @ torch.diag(torch.tensor([0.25, 1.0, 0.01])) @ turn.T
    assert torch.allclose(drawn.mean(0), torch.tensor([1.0, 2.0, 3.0]), atol=0.02)
    assert torch.allclose(drawn.T.cov(), covariance, atol=0.02)
    assert torch.allclose(parameters["log_scales"].exp()[0], torch.tensor([0.5, 1.0, 0.1]) / 1.6)


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


def test_screens_sizes_count_before_they_are_forgotten() -> None:
    """The published code forgets them first; here they are an option, which None turns off."""
    parameters, optimizers = trained(5)
    with torch.no_grad():
        parameters["opacity_logits"].fill_(1.0)
    seen = Statistics(torch.zeros(5), torch.ones(5), torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3]))
    config = StrategyConfig(largest_radius=0.4)
    assert densify_and_prune(dict(parameters), [], seen, config).tolist() == [0, 2, 4]
    config = replace(config, largest_radius=None)
    assert densify_and_prune(parameters, optimizers, seen, config).tolist() == [0, 1, 2, 3, 4]


def test_what_exceeds_nothing_stays_bit_by_bit() -> None:
    parameters, optimizers = trained(7)
    before = saved(parameters, optimizers)
    config = StrategyConfig(gradient=math.inf, least_opacity=0)
    for _ in range(2):
        parents = densify_and_prune(parameters, optimizers, statistics_of(7), config)
        assert parents.tolist() == list(range(7))
        assert_same_bits(saved(parameters, optimizers), before)


def test_limits_include_themselves() -> None:
    """A scale of exactly the limit is duplicated; an opacity and a size of exactly theirs stay."""
    parameters, _ = trained(2)
    with torch.no_grad():
        parameters["log_scales"].fill_(0.0)
        parameters["opacity_logits"].fill_(0.0)
    seen = Statistics(torch.tensor([0.5, 0.25]), torch.ones(2), torch.ones(2))
    config = StrategyConfig(
        gradient=0.5, split_scale=1.0, least_opacity=0.5, largest_scale=1.0, largest_radius=1.0
    )
    before = parameters["means"].detach().clone()
    assert densify_and_prune(parameters, [], seen, config).tolist() == [0, 1, 0]
    assert_same_bits(parameters["means"].detach(), before[[0, 1, 0]])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("opacity", [0.005, 0.01, 0.1, 0.3, 1 / 3, 0.5, 0.9])
def test_a_reset_to_the_least_opacity_removes_nothing(opacity: float, dtype: torch.dtype) -> None:
    """However the two round: a reset is allowed to leave exactly what a Gaussian needs to stay."""
    config = StrategyConfig(
        gradient=9.0, least_opacity=opacity, reset_every=1, reset_opacity=opacity
    )
    parameters = draw_parameters(3, dtype=dtype)
    with torch.no_grad():
        parameters["opacity_logits"].fill_(5.0)
    reset_opacities(parameters, [], config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = densify_and_prune(parameters, [], Statistics.zeros(3), config)
    assert kept.tolist() == [0, 1, 2]


def test_no_opacity_is_below_zero() -> None:
    parameters = draw_parameters(3)
    with torch.no_grad():
        parameters["opacity_logits"].copy_(torch.tensor([-math.inf, -1e4, math.nan]))
    config = StrategyConfig(gradient=9.0, least_opacity=0.0)
    assert densify_and_prune(parameters, [], Statistics.zeros(3), config).tolist() == [0, 1]


def test_transparent_ones_take_no_place() -> None:
    parameters, _ = trained(4)
    with torch.no_grad():
        parameters["opacity_logits"].copy_(torch.tensor([1.0, -5.0, -5.0, 1.0]))
        parameters["log_scales"].fill_(-5.0)
    seen = Statistics(torch.ones(4), torch.ones(4), torch.zeros(4))
    parents = densify_and_prune(parameters, [], seen, replace(CONFIG, most=4))
    assert parents.tolist() == [0, 3, 0, 3]


def test_an_opacity_that_is_not_a_number_is_the_first_to_go() -> None:
    parameters, _ = trained(3)
    with torch.no_grad():
        parameters["opacity_logits"].copy_(torch.tensor([math.nan, -9.0, -8.0]))
    with pytest.warns(UserWarning, match="all 3 Gaussians"):
        assert densify_and_prune(parameters, [], statistics_of(3), CONFIG).tolist() == [2]


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


def test_the_largest_gradients_come_first_and_the_earlier_of_two_equal_ones() -> None:
    parameters, _ = trained(6)
    with torch.no_grad():
        parameters["opacity_logits"].fill_(1.0)
        parameters["log_scales"].fill_(-5.0)
    gradients = torch.tensor([0.6, 0.9, 0.6, 0.1, 0.7, 0.6])
    seen = Statistics(gradients, torch.ones(6), torch.zeros(6))
    config = replace(CONFIG, most=9)
    parents = densify_and_prune(parameters, [], seen, config)
    assert parents.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 4]


@pytest.mark.parametrize(
    "config",
    [
        StrategyConfig(least_opacity=0.999),
        StrategyConfig(least_opacity=0, largest_scale=1e-9),
        StrategyConfig(least_opacity=0, largest_radius=1e-9),
    ],
    ids=["opacity", "scale", "radius"],
)
def test_the_most_opaque_one_is_kept_if_nothing_would_be(config: StrategyConfig) -> None:
    parameters, optimizers = trained(5)
    before, states = saved(parameters, optimizers)
    seen = statistics_of(5)._replace(radii=torch.ones(5))
    with pytest.warns(
        UserWarning, match="would remove all 5 Gaussians: the most opaque one is kept"
    ):
        parents = densify_and_prune(parameters, optimizers, seen, config)
    assert parents.tolist() == [int(before["opacity_logits"].argmax())]
    after, new_states = saved(parameters, optimizers)
    assert_same_bits(after, {name: value[parents] for name, value in before.items()})
    for name, state in new_states.items():
        assert_same_bits(state["exp_avg"], states[name]["exp_avg"][parents])


def warned_on_ranks() -> int:
    parameters, optimizers = trained(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = StrategyConfig(least_opacity=0.999)
        densify_and_prune(parameters, optimizers, statistics_of(5), config)
    return len(caught)


def test_one_of_several_processes_says_so(pools: Pools) -> None:
    assert pools(2).run(warned_on_ranks) == [1, 0]


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


def test_due_by_the_steps_that_were_taken() -> None:
    config = StrategyConfig(start=10, stop=30, every=5, reset_every=7)
    steps = range(60)
    assert [t + 1 for t in steps if strategy.densifies(config, t)] == [10, 15, 20, 25]
    assert [t + 1 for t in steps if strategy.resets(config, t)] == [7, 14, 21, 28]
    either = [t + 1 for t in steps if strategy.due(config, t)]
    assert either == [7, 10, 14, 15, 20, 21, 25, 28]
    assert not any(strategy.resets(replace(config, reset_every=0), t) for t in steps)


def test_apply_does_what_is_due_and_nothing_else() -> None:
    config = replace(CONFIG, start=0, stop=99, every=2, reset_every=3, reset_opacity=0.4)
    changed = {}
    for step in range(6):
        parameters, optimizers = trained(8)
        old = dict(parameters)
        parents = strategy.apply(parameters, optimizers, statistics_of(8), config, step)
        changed[step] = sorted(name for name, p in parameters.items() if p is not old[name])
        assert (parents.tolist() == list(range(8))) == (step % 2 == 0)
        lowered = bool((parameters["opacity_logits"].sigmoid() < 0.41).all())
        assert lowered == (step % 3 == 2)
    everything = sorted(draw_parameters(1))
    assert changed == {
        0: [], 1: everything, 2: ["opacity_logits"], 3: everything, 4: [], 5: everything,
    }  # fmt: skip


def test_statistics_add_up() -> None:
    seen = Statistics.zeros(3)
    seen.add_(
        Statistics(torch.tensor([1.0, 2, 0]), torch.tensor([1, 1, 0]), torch.tensor([3.0, 1, 0]))
    )
    seen.add_(
        Statistics(torch.tensor([1.0, 0, 0]), torch.tensor([2, 0, 0]), torch.tensor([2.0, 2, 0]))
    )
    assert [each.tolist() for each in seen] == [[2, 2, 0], [3, 1, 0], [3, 2, 0]]


def test_the_same_draws_whatever_came_before() -> None:
    """From torch's global generator, which picardopt seeds for the step; the same for any dtype."""
    drawn = []
    for dtype in (torch.float32, torch.float32, torch.float64):
        parameters = draw_parameters(9, dtype=dtype)
        torch.manual_seed(5)
        densify_and_prune(parameters, [], statistics_of(9), CONFIG)
        drawn.append(parameters["means"].detach())
    assert_same_bits(drawn[0], drawn[1])
    assert torch.allclose(drawn[0].double(), drawn[2], atol=1e-6)
    assert len(drawn[0]) != 9


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


def test_rows_that_do_not_belong_together_are_named() -> None:
    parameters, optimizers = trained(6)
    with pytest.raises(
        ValueError, match=r"views: shape \(5,\); give one row for each of the 6 means"
    ):
        seen = statistics_of(6)._replace(views=torch.ones(5))
        densify_and_prune(parameters, optimizers, seen, CONFIG)
    parameters["colours"] = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"colours: shape \(4, 3\)"):
        densify_and_prune(parameters, optimizers, statistics_of(6), CONFIG)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"every": 0}, "every=0: give a whole number of at least 1"),
        ({"start": -1}, "start=-1"),
        ({"most": 0}, "most=0"),
        ({"gradient": math.nan}, "gradient=nan: give a number of at least 0"),
        ({"split_scale": -0.1}, "split_scale=-0.1"),
        ({"largest_scale": 0.0}, "largest_scale=0.0: give a positive number, or None"),
        ({"largest_radius": math.nan}, "largest_radius=nan"),
        ({"least_opacity": 1.0}, "least_opacity=1.0: give a number from 0 to below 1"),
        ({"reset_opacity": 0.0}, "reset_opacity=0.0: give a number between 0 and 1"),
        (
            {"reset_every": 10, "least_opacity": 0.02},
            "reset_opacity=0.01: give at least least_opacity=0.02",
        ),
    ],
)
def test_a_configuration_out_of_range_is_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StrategyConfig(**wrong)


def test_none_at_all_stay_none() -> None:
    parameters = draw_parameters(0)
    assert len(densify_and_prune(parameters, [], Statistics.zeros(0), CONFIG)) == 0
    reset_opacities(parameters, [], CONFIG)


def test_the_comparison_of_moments_can_fail() -> None:
    parameters, optimizers = trained(3)
    before = saved(parameters, optimizers)
    optimizers[0].state[parameters["means"]]["exp_avg"][0, 0] += 1
    assert list(differences(saved(parameters, optimizers), before))
