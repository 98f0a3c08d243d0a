"""Gaussians' parameters after steps of all of torch's kinds of optimizers, with what is compared of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import Statistics
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers.gaussians import draw_parameters

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
        sum(p.square().sum() for p in parameters.values()).backward()
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
