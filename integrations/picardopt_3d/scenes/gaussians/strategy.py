"""Adds and removes Gaussians: duplicate, split, prune, and reset opacities (3D Gaussian Splatting, section 5.2).

Pure functions over a dict of parameters, their optimizers and the running statistics. They put new parameters in the
place of the old ones, in the dict and in the optimizers' groups, and take the optimizers' states along. Everything is
computed before anything is replaced: an error leaves all as it was.

Where this differs from the published code, and why:

- Screen size. There the largest radii are reset by the step that adds Gaussians, just before the ones that are too
  large on the screen are looked for, so that none is ever found. Here the radii are looked at first. The option is
  `StrategyConfig.largest_radius`; None does what the published code does in effect. (There the limit on the size in
  the world also applies only once opacities have been reset. Here the two options stand alone.)
- Halves of a Gaussian that is split count with 1/1.6 of its radius on the screen, as they do in the world.
- Gaussians that are too transparent are removed first, and never duplicated or split.
- Gaussians that were never seen, or whose statistics or scales are not finite, are not duplicated or split.
- Thresholds that would remove every Gaussian keep the most opaque one.
- The number of Gaussians has a limit, `StrategyConfig.most`.
- Optimizer states are taken along whatever their names, not just Adam's two moments (see `replace`).
- The samples of a split come from torch's global CPU generator, for Gaussians on any device, so that a step's draw
  does not depend on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.replace import replace_rows
from picardopt_3d.scenes.gaussians.splats import logit, rotation_matrices
from picardopt_3d.scenes.gaussians.statistics import Statistics

SHRINK = 1.6
"""A Gaussian is split into two whose standard deviations are smaller by this factor (0.8 times their number, 2)."""


def densifies(config: StrategyConfig, step: int) -> bool:
    """Returns whether Gaussians are added and removed after a step."""
    taken = step + 1
    return config.start <= taken < config.stop and taken % config.every == 0


def resets(config: StrategyConfig, step: int) -> bool:
    """Returns whether opacities are reset after a step."""
    taken = step + 1
    return config.reset_every > 0 and taken < config.stop and taken % config.reset_every == 0


def due(config: StrategyConfig, step: int) -> bool:
    """Returns whether `apply` does anything after a step; a function of the step alone."""
    return densifies(config, step) or resets(config, step)


def apply(
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    statistics: Statistics,
    config: StrategyConfig,
    step: int,
) -> Tensor:
    """Does what is due after a step: adds and removes Gaussians, then resets opacities.

    Where `densifies` holds, the statistics belong to the old Gaussians afterwards: start new ones.

    Args:
        parameters: As in `densify_and_prune`.
        optimizers: Likewise.
        statistics: Likewise.
        config: Likewise.
        step: The step, from 0.

    Returns:
        For each Gaussian the index of the one that it stems from, int64. [new count]
    """
    if densifies(config, step):
        parents = densify_and_prune(parameters, optimizers, statistics, config)
    else:
        means = parameters["means"]
        parents = torch.arange(len(means), device=means.device)
    if resets(config, step):
        reset_opacities(parameters, optimizers, config)
    return parents


@torch.no_grad()
def densify_and_prune(
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    statistics: Statistics,
    config: StrategyConfig,
) -> Tensor:
    """Duplicates and splits the Gaussians whose centres are pulled most, and removes transparent and large ones.

    A duplicate equals its original. The two halves of a split replace it: their centres are drawn from it, their
    scales are its own / 1.6. Both kinds of new Gaussians begin with optimizer moments of zero; the others keep theirs.

    Args:
        parameters: The parameters by the names of the fields of `Splats`, one row a Gaussian; "means",
            "log_scales" and "opacity_logits" must be there. Without "rotations" the Gaussians' axes are the world's, of
            as many dimensions as there are columns. New parameters are put in.
        optimizers: The optimizers that train them; their groups and states change with the parameters.
        statistics: What steps measured since the last call.
        config: The thresholds.

    Returns:
        For each Gaussian the index of the one that it stems from, int64: first those that stay, in order, then the
        duplicates, then the first and the second halves. [new count]

    Raises:
        ValueError: If a parameter or a statistic has another number of rows than the means.
    """
    count = len(parameters["means"])
    rows = {**parameters, **statistics._asdict()}
    for name, value in rows.items():
        if value.shape[:1] != (count,):
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}; give one row for each of the {count} means"
            )
    parents, copies, halves = _grown(parameters, statistics, config)
    kept = ~_too_large(parameters, statistics, config, parents, halves)
    parents, copies, halves = parents[kept], copies[kept], halves[kept]
    if count and not len(parents):
        _warn_of_nothing_left(count)
        opacities = parameters["opacity_logits"].nan_to_num(nan=-math.inf)
        parents = opacities.argmax()[None]
        copies = halves = torch.zeros_like(parents, dtype=torch.bool)
    values = {name: old[parents] for name, old in parameters.items()}
    if bool(halves.any()):
        values["means"][halves] += _samples(values, halves)
        values["log_scales"][halves] -= math.log(SHRINK)
    replace_rows(parameters, optimizers, values, parents, copies | halves)
    return parents


@torch.no_grad()
def reset_opacities(
    parameters: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], config: StrategyConfig
) -> None:
    """Lowers opacities to `config.reset_opacity` at most, and sets their optimizer moments to zero.

    The opacities become a new parameter, so that guesses made with the old ones are not taken up again.

    Args:
        parameters: The parameters by name; only "opacity_logits" changes.
        optimizers: The optimizers that train them.
        config: The opacity that is left at most.
    """
    old = parameters["opacity_logits"]
    all_rows = torch.arange(len(old), device=old.device)
    values = {"opacity_logits": old.clamp(max=logit(config.reset_opacity))}
    replace_rows(
        parameters, optimizers, values, all_rows, torch.ones_like(all_rows, dtype=torch.bool)
    )


def _grown(
    parameters: Mapping[str, Tensor], statistics: Statistics, config: StrategyConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parents of all Gaussians once transparent ones are gone and pulled ones are doubled.

    Returns:
        The parents, and which rows are duplicates and which are halves.
    """
    visible = parameters["opacity_logits"] >= logit(config.least_opacity)
    scales = parameters["log_scales"].exp().amax(1)
    pull = statistics.gradients / statistics.views
    chosen = visible & pull.isfinite() & scales.isfinite() & (pull >= config.gradient)
    room = max(0, config.most - int(visible.sum()))
    if int(chosen.sum()) > room:
        order = pull.where(chosen, -math.inf).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(chosen).index_fill_(0, order[:room], True)
    small = scales <= config.split_scale
    staying, copied, split = (
        mask.nonzero()[:, 0]
        for mask in (visible & ~(chosen & ~small), chosen & small, chosen & ~small)
    )
    parents = torch.cat([staying, copied, split, split])
    position = torch.arange(len(parents), device=parents.device)
    halves = position >= len(staying) + len(copied)
    return parents, (position >= len(staying)) & ~halves, halves


def _too_large(
    parameters: Mapping[str, Tensor],
    statistics: Statistics,
    config: StrategyConfig,
    parents: Tensor,
    halves: Tensor,
) -> Tensor:
    """Returns which Gaussians are larger than the options allow, halves by their new sizes."""
    sizes = torch.where(halves, 1 / SHRINK, 1.0)
    found = torch.zeros_like(halves)
    if config.largest_scale is not None:
        scales = parameters["log_scales"].exp().amax(1)
        found |= scales[parents] * sizes > config.largest_scale
    if config.largest_radius is not None:
        found |= statistics.radii[parents] * sizes > config.largest_radius
    return found


def _samples(values: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Returns offsets drawn from the Gaussians of some rows. [rows, dimensions]."""
    scales = values["log_scales"][rows].exp()
    offsets = scales * torch.randn(scales.shape).to(scales)
    if "rotations" not in values:
        return offsets
    return (rotation_matrices(values["rotations"][rows]) * offsets[:, None]).sum(-1)


def _warn_of_nothing_left(count: int) -> None:
    """Warns; with several processes only the first one does."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    warnings.warn(
        f"the thresholds would remove all {count} Gaussians: the most opaque one is kept; lower least_opacity, or "
        "raise largest_scale and largest_radius",
        stacklevel=3,
    )
