"""Gaussians that are pulled at random points: a scene's parameters, carry and restructuring without a rasterizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from picardopt_3d.problem import Losses
from picardopt_3d.scenes.gaussians import strategy
from picardopt_3d.scenes.gaussians.config import StrategyConfig
from picardopt_3d.scenes.gaussians.statistics import RunningStatistics, Statistics
from torch import Tensor, nn

from picardopt import Carry, ParallelPicardOptimizer, Restructure, step_rng
from tests.helpers.problems import quantize

RATES = {
    "means": 4e-3, "log_scales": 4e-3, "rotations": 2e-3, "opacity_logits": 3e-2, "colours": 5e-3,
}  # fmt: skip
SHORT = StrategyConfig(
    start=3,
    stop=1000,
    every=3,
    gradient=0.004,
    split_scale=0.4,
    least_opacity=0.3,
    largest_scale=0.7,
    largest_radius=0.6,
    reset_every=7,
    reset_opacity=0.5,
    most=48,
)
"""All that can happen does within 26 steps; windows of 5 and more span several changes."""
LONG = replace(SHORT, every=10, reset_every=13)
"""Windows end between two changes."""


def draw_parameters(
    count: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Parameters of the shapes of `Splats` of degree 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    values = {
        "means": normal(3) / 2,
        "log_scales": normal(3) / 3 - 1,
        "rotations": normal(4),
        "opacity_logits": normal(),
        "colours": normal(3),
        "harmonics": normal(3, 3),
    }
    return {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}


class Pulled(nn.Module):
    """A sum of Gaussians fitted to a function of space, a few Gaussians and a few points a step.

    Gradients are piecewise constant, so that several steps a sweep are exact (see `problems`).
    """

    def __init__(
        self,
        config: StrategyConfig = SHORT,
        *,
        base: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        one: bool = True,
        across: bool = False,
        count: int = 24,
    ) -> None:
        super().__init__()
        self.config, self.across = config, across
        drawn = draw_parameters(count)
        self.splats = nn.ParameterDict({name: drawn[name] for name in RATES})
        groups = [{"params": [self.splats[name]], "lr": rate} for name, rate in RATES.items()]
        self.bases: list[torch.optim.Optimizer] = (
            [base(groups)] if one else [base([group]) for group in groups]
        )
        self.happened: Counter[str] = Counter()
        self.statistics = RunningStatistics(count)

    def closure(self, step: int) -> Losses:
        for base in self.bases:
            base.zero_grad()
        count = len(self.splats["means"])
        points, chosen = torch.rand(4, 3) - 0.5, torch.randint(count, (3,))
        values = {name: quantize(value, 0.25)[chosen] for name, value in self.splats.items()}
        distances = (points[:, None] - values["means"]) * torch.exp(-values["log_scales"])
        weights = torch.exp(-distances.square().sum(-1) / 2) * values["opacity_logits"].sigmoid()
        turned = values["colours"] * nn.functional.normalize(values["rotations"], dim=1)[:, 1:]
        total = (weights @ turned - torch.sin(5 * points)).square().mean()
        total.backward()
        with torch.no_grad():
            assert self.splats["means"].grad is not None
            seen = torch.zeros(count).index_fill_(0, chosen, 1)
            widths = quantize(self.splats["log_scales"], 0.25).exp().amax(1)
            pull = self.splats["means"].grad.norm(dim=1)
            aux = {"gradients": pull, "views": seen, "radii": widths * seen * torch.rand(())}
        return Losses(total, {}, aux)

    def update(self, returned: Losses) -> None:
        self.statistics.present().add_(Statistics(**returned.aux))

    def restructured(self, step: int) -> Tensor:
        """Does what is due."""
        parameters, before = dict(self.splats.items()), self.splats["means"].detach()
        seen = self.statistics.present()
        parents = strategy.apply(parameters, self.bases, seen, self.config, step)
        self.splats.update(parameters)
        self.happened += self._counted(before, parents)
        self.happened["reset"] += strategy.resets(self.config, step)
        if strategy.densifies(self.config, step):
            self.statistics.reset(len(parents))
        return parents

    def _counted(self, before: Tensor, parents: Tensor) -> Counter[str]:
        """How many Gaussians met which fate."""
        children = parents.bincount(minlength=len(before))
        split = (self.splats["means"].detach() != before[parents]).any(1)
        halves, copies = int(split.sum()), int((children == 2).sum()) - int(split.sum()) // 2
        removed = int((children == 0).sum())
        return Counter({"removed": removed, "halves": halves, "duplicates": copies})

    def due(self, step: int) -> bool:
        return strategy.due(self.config, step)

    def wrap(self, **options: Any) -> ParallelPicardOptimizer:
        restructure = Restructure(self.restructured, self.due, across=self.across)
        carry = Carry(self, update=self.update)
        options = {"tolerance": 0, "seed": 3, "carry": carry, "restructure": restructure, **options}
        return ParallelPicardOptimizer(
            self.bases if len(self.bases) > 1 else self.bases[0], **options
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes a state with any number of Gaussians."""
        for name, parameter in self.splats.items():
            parameter.data = torch.empty_like(state_dict[f"splats.{name}"])
            parameter.grad = None
        self.statistics.reset(len(state_dict["statistics.views"]))
        return super().load_state_dict(state_dict, *args, **kwargs)


def state_of(scene: Pulled) -> list[Any]:
    """Everything that law 1 compares, in an order that a resumed run shares."""
    states = []
    for base in scene.bases:
        for group in base.param_groups:
            for p in group["params"]:
                states.append({k: v.clone() for k, v in sorted(base.state[p].items())})
                states.append({k: v for k, v in group.items() if k != "params"})
    return [{k: v.detach().clone() for k, v in scene.state_dict().items()}, states]


def sequential(scene: Pulled, steps: int, seed: int = 3) -> tuple[list[Any], list[Any]]:
    """The loop that a run at tolerance 0 equals bitwise."""
    losses, states = [], []
    for t in range(steps):
        with step_rng(seed, t):
            returned = scene.closure(t)
            for base in scene.bases:
                base.step()
            scene.update(returned)
            if scene.due(t):
                scene.restructured(t)
        losses.append(returned.total.detach())
        states.append(state_of(scene))
    return losses, states


def run(
    scene: Pulled, optimizer: ParallelPicardOptimizer, steps: Iterable[int]
) -> tuple[list[Any], list[Any]]:
    """Takes these steps."""
    losses, states = [], []
    for _ in steps:
        losses.append(optimizer.step(scene.closure).total)
        states.append(state_of(scene))
    return losses, states
