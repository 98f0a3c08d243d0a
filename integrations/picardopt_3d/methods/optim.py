"""The optimizer of a scene: any of torch's by name, with a learning rate for each of the scene's groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from picardopt_3d.methods.schedules import Points, check_points, value_at


def field_rates(
    encoding: Points = 0.01, networks: Points = 0.01, background: Points = 0.001
) -> dict[str, Points]:
    """Returns learning rates for the groups of a field.

    Args:
        encoding: Learning rate of grids and hash tables.
        networks: Learning rate of the networks, and of the deviation of a signed distance field.
        background: Learning rate of a learned background.
    """
    return {"encoding": encoding, "networks": networks, "background": background}


def mesh_rates(
    shape: Points = 0.01,
    encoding: Points = 0.01,
    networks: Points = 0.01,
    background: Points = 0.01,
) -> dict[str, Points]:
    """Returns learning rates for the groups of a tetrahedral grid.

    Args:
        shape: Learning rate of the signed distances and the offsets of the vertices.
        encoding: Learning rate of the colours' hash tables.
        networks: Learning rate of the colours' network.
        background: Learning rate of a learned background.
    """
    return {"shape": shape} | field_rates(encoding, networks, background)


def gaussian_rates(
    means: Points = 1e-3,
    log_scales: Points = 0.005,
    rotations: Points = 0.005,
    opacity_logits: Points = 0.05,
    colours: Points = 0.01,
    harmonics: Points | None = None,
) -> dict[str, Points]:
    """Returns learning rates for the groups of 3D Gaussians, the tensors of `Splats`.

    Args:
        means: Learning rate of the centres.
        log_scales: Learning rate of the logarithms of the standard deviations.
        rotations: Learning rate of the quaternions.
        opacity_logits: Learning rate of the opacities before the sigmoid.
        colours: Learning rate of the colours from all sides.
        harmonics: Learning rate of how colours depend on the direction, which Gaussians of degree 0 are without; None:
            a twentieth of `colours`, as in 3D Gaussian Splatting.
    """
    if harmonics is None:
        if isinstance(colours, float | int):
            harmonics = colours / 20
        else:
            harmonics = tuple((step, rate / 20) for step, rate in colours)
    return {
        "means": means,
        "log_scales": log_scales,
        "rotations": rotations,
        "opacity_logits": opacity_logits,
        "colours": colours,
        "harmonics": harmonics,
    }


def texture_rates(texture: Points = 0.01, offsets: Points = 1e-3) -> dict[str, Points]:
    """Returns learning rates for the groups of a textured mesh.

    Args:
        texture: Learning rate of the texture's logits.
        offsets: Learning rate of the displacements of the vertices.
    """
    return {"texture": texture, "offsets": offsets}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The part of a stage's configuration that describes the scene's optimizer.

    Attributes:
        optimizer: Name of a class of `torch.optim`.
        rates: Learning rate of each of the scene's parameter groups: a number, or (step, rate) pairs between which the
            rate changes linearly.
        geometric: Names of groups whose rate changes by equal factors instead, as that of the means of 3D Gaussians.
        betas: `betas` of optimizers that have them, such as Adam.
        eps: `eps` of optimizers that have it.
        momentum: `momentum` of optimizers that have it, such as SGD; None: the optimizer's default.
        weight_decay: `weight_decay`; None: the optimizer's default.
    """

    optimizer: str = "Adam"
    rates: Mapping[str, Points] = field(default_factory=field_rates)
    geometric: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15
    momentum: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Checks names and values.

        Raises:
            ValueError: A rate is not positive, a geometric one is none of the rates, the optimizer is unknown, or it
                lacks one of the options.
        """
        for name, points in self.rates.items():
            check_points(f"rates.{name}", points)
            pairs = ((0, points),) if isinstance(points, float | int) else points
            if not all(rate > 0 for _, rate in pairs):
                raise ValueError(f"rates.{name}={points}: give a positive number")
        for name in self.geometric:
            if name not in self.rates:
                raise ValueError(
                    f"geometric={name!r}: give names of rates: {', '.join(self.rates)}"
                )
        known = _numbers_of(self.optimizer)
        for name in ("momentum", "weight_decay"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {self.optimizer} has no such option; leave it out"
                )


def check_rates(config: OptimizerConfig, groups: Mapping[str, bool]) -> None:
    """Checks that each group of a scene has a rate, and each rate a group.

    Args:
        config: The rates.
        groups: Whether there are parameters in each group.

    Raises:
        ValueError: A group has no rate, or a rate has no group.
    """
    for name in config.rates:
        if name not in groups:
            raise ValueError(
                f"rates.{name}: the scene has no such parameters; it has {', '.join(groups)}"
            )
    missing = [name for name, filled in groups.items() if filled and name not in config.rates]
    if missing:
        raise ValueError(
            f"rates={dict(config.rates)}: give a rate for the scene's {', '.join(missing)} too"
        )


def build_optimizer(
    config: OptimizerConfig, groups: Mapping[str, Sequence[nn.Parameter]]
) -> Optimizer:
    """Builds the optimizer of a scene.

    Args:
        config: Name and options of the optimizer.
        groups: The scene's parameters by role; empty groups are left out.

    Raises:
        ValueError: A group has no rate, or a rate has no group.
    """
    check_rates(config, {name: bool(parameters) for name, parameters in groups.items()})
    known, given = _numbers_of(config.optimizer), {}
    for name in ("betas", "eps", "momentum", "weight_decay"):
        if name in known and getattr(config, name) is not None:
            given[name] = getattr(config, name)
    listed = [
        {"params": list(parameters), "lr": value_at(config.rates[name], 0), "name": name}
        for name, parameters in groups.items()
        if parameters
    ]
    optimizer: Optimizer = _class_of(config.optimizer)(listed, **given)
    return optimizer


def build_scheduler(config: OptimizerConfig, optimizer: Optimizer) -> LRScheduler | None:
    """Builds the scheduler of learning rates that change; returns None if all are constant.

    Args:
        config: The rates.
        optimizer: From `build_optimizer`.
    """
    names = [group["name"] for group in optimizer.param_groups]
    if all(isinstance(config.rates[name], float | int) for name in names):
        return None
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # the scheduler multiplies it by the rate of each step
    rates: list[Callable[[int], float]] = [
        partial(value_at, config.rates[name], geometric=name in config.geometric) for name in names
    ]
    return LambdaLR(optimizer, rates)


def _class_of(name: str) -> Any:
    """Returns the class of an optimizer.

    Raises:
        ValueError: `torch.optim` has no optimizer of that name.
    """
    found = getattr(torch.optim, name, None)
    if not (inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer):
        raise ValueError(
            f"optimizer={name!r}: give the name of a class of torch.optim, such as Adam, AdamW or SGD"
        )
    return found


def _numbers_of(name: str) -> set[str]:
    """Returns the names of the arguments of an optimizer's class."""
    return set(inspect.signature(_class_of(name)).parameters)
