"""Which Gaussians are duplicated, split, removed and kept, where halves are drawn, and when all that is due."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from picardopt_3d.scenes.gaussians import strategy
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import Statistics
from picardopt_3d.scenes.gaussians.strategy import densify_and_prune, reset_opacities
from torch import nn

from tests.helpers.gaussians import draw_parameters
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.helpers.trained_gaussians import CONFIG, saved, statistics_of, trained


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
