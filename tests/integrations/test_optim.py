"""Optimizers by name, rates by group, and rates that move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picardopt_3d.methods.optim import (
    OptimizerConfig,
    build_optimizer,
    build_scheduler,
    field_rates,
)
from torch import nn

from picardopt import ParallelPicardOptimizer, step_rng

STEPS = 6


def groups() -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(0)
    return {
        "encoding": [nn.Parameter(torch.randn(3))],
        "networks": [nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))],
        "background": [],
    }


def config(**changed: Any) -> OptimizerConfig:
    return OptimizerConfig(**({"rates": field_rates(0.1, 0.2)} | changed))


def test_adam_has_a_rate_for_each_group() -> None:
    parameters = groups()
    optimizer = build_optimizer(config(), parameters)
    assert type(optimizer) is torch.optim.Adam
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("encoding", 0.1),
        ("networks", 0.2),
    ]
    assert [g["params"] for g in optimizer.param_groups] == [
        parameters["encoding"],
        parameters["networks"],
    ]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.99), 1e-15)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop", "SGD", "Adagrad", "Rprop"])
def test_any_optimizer_of_torch_is_had_by_name(name: str) -> None:
    parameters = groups()
    optimizer = build_optimizer(config(optimizer=name), parameters)
    assert type(optimizer) is getattr(torch.optim, name)
    before = parameters["encoding"][0].detach().clone()
    sum(p.square().sum() for group in parameters.values() for p in group).backward()
    optimizer.step()
    assert not torch.equal(parameters["encoding"][0], before)


def test_numbers_that_an_optimizer_has_are_handed_over() -> None:
    optimizer = build_optimizer(config(optimizer="SGD", momentum=0.8, weight_decay=0.1), groups())
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.8, 0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "Adamm"}, "optimizer='Adamm': give the name of a class of torch.optim"),
        ({"optimizer": "Optimizer"}, "optimizer='Optimizer': give the name"),
        ({"optimizer": "lr_scheduler"}, "optimizer='lr_scheduler': give the name"),
        ({"momentum": 0.9}, "momentum=0.9: Adam has no such option"),
        (
            {"geometric": ("encodings",)},
            "geometric='encodings': give names of rates: encoding, net",
        ),
        ({"rates": {"encoding": 0.0}}, "rates.encoding=0.0: give a positive number"),
        ({"rates": {"encoding": ((0, 0.1), (5, 0.0))}}, r"rates.encoding=.*give a positive number"),
    ],
)
def test_what_is_no_optimizer_is_said_at_once(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_rates_and_groups_are_held_against_each_other_by_name() -> None:
    with pytest.raises(ValueError, match=r"rates.table: .* it has encoding, networks, background"):
        build_optimizer(config(rates=field_rates() | {"table": 0.1}), groups())
    with pytest.raises(ValueError, match=r"give a rate for the scene's networks too"):
        build_optimizer(config(rates={"encoding": 0.1}), groups())


def test_rates_that_stay_need_no_scheduler() -> None:
    assert build_scheduler(config(), build_optimizer(config(), groups())) is None


def test_a_geometric_rate_moves_by_equal_factors_beside_a_linear_one() -> None:
    points = ((0, 0.16), (4, 0.01))
    moving = config(rates=field_rates(points, points), geometric=("encoding",))
    base = build_optimizer(moving, groups())
    scheduler = build_scheduler(moving, base)
    assert scheduler is not None
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in base.param_groups])
        base.step()
        scheduler.step()
    encoding, networks = zip(*seen, strict=True)
    assert encoding == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01])
    assert networks == pytest.approx([0.16, 0.1225, 0.085, 0.0475, 0.01, 0.01])
    constant = config(geometric=("encoding",))
    assert build_scheduler(constant, build_optimizer(constant, groups())) is None


def run(window: int | None) -> tuple[list[list[float]], list[torch.Tensor], list[int]]:
    """Rates of every step, the parameters after the last one, and the strides; None: the plain loop."""
    moving = config(rates=field_rates(((0, 0.1), (4, 0.02)), 0.2), optimizer="Rprop")
    parameters = groups()
    base = build_optimizer(moving, parameters)
    scheduler = build_scheduler(moving, base)
    assert scheduler is not None
    flat = [p for group in parameters.values() for p in group]
    optimizer: Any = base
    if window is not None:
        optimizer = ParallelPicardOptimizer(
            base, window=window, tolerance=0, lr_scheduler=scheduler, total_steps=STEPS
        )

    def closure(step: int) -> torch.Tensor:
        base.zero_grad()
        loss = sum(((p - 5.0) * torch.linspace(1, 2, p.numel()).view(p.shape)).sum() for p in flat)
        loss.backward()
        return loss

    rates = []
    for step in range(STEPS):
        rates.append([group["lr"] for group in base.param_groups])
        if window is None:
            with step_rng(0, step):
                closure(step)
                base.step()
        else:
            optimizer.step(closure)
        scheduler.step()
    return rates, [p.detach() for p in flat], [] if window is None else optimizer.stats.strides


def test_rates_that_move_are_the_scheduler_that_running_ahead_knows() -> None:
    rates, plain, _ = run(None)
    assert [encoding for encoding, _ in rates] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])
    assert {networks for _, networks in rates} == {0.2}
    seen, ahead, strides = run(4)
    assert seen == rates
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))
    assert max(strides) > 1
