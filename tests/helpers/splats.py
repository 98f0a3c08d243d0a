"""Points that split and die as Gaussian-splatting codebases have it: the problem for steps that restructure."""

from typing import Any

import torch
from torch import Tensor, nn

from picardopt import Restructure, step_rng

EVERY = 5


class Splats(nn.Module):
    """A sum of Gaussian bumps on a line, fitted to a target; one optimizer per tensor.

    Statistics are buffers that the closure rewrites: summed position gradients and counts.
    """

    def __init__(self, count: int = 6, coarse: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kind = torch.bfloat16 if coarse else torch.float32
        self.means = nn.Parameter(torch.linspace(-1, 1, count).to(kind))
        self.heights = nn.Parameter((0.1 * torch.randn(count, generator=generator)).to(kind))
        self.background = nn.Parameter(torch.zeros((), dtype=kind))
        self.register_buffer("slopes", torch.zeros(count))
        self.register_buffer("seen", torch.zeros(count, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-20 * (x[:, None] - self.means[None]).square())
        return (bumps * self.heights).sum(1) + self.background

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "means": torch.optim.Adam([self.means], lr=1e-2),
            "heights": torch.optim.Adam([self.heights], lr=2e-2),
            "background": torch.optim.SGD([self.background], lr=1e-2, momentum=0.9),
        }

    def closure(self, step: int) -> Tensor:
        self.zero_grad()
        x = 2 * torch.rand(16) - 1
        loss = (self(x) - torch.sin(5 * x)).square().mean()
        loss.backward()
        with torch.no_grad():
            self.slopes += self.means.grad.abs().float()
            self.seen += 1
        return loss


class Densify:
    """Splits the steepest third and drops the flattest point, with parameters replaced and state re-keyed."""

    def __init__(self, splats: Splats, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.splats, self.optimizers = splats, optimizers
        self.called: list[int] = []

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        self.called.append(step)
        splats = self.splats
        steep = splats.slopes / splats.seen.clamp(min=1)
        order = steep.argsort(descending=True, stable=True)
        parents = torch.cat([order[:-1], order[: len(order) // 3]])
        born = torch.arange(len(parents)) >= len(order) - 1
        for name in ("means", "heights"):
            old = getattr(splats, name)
            new = old[parents]
            if name == "means":  # drawn from the step's own stream
                new = torch.where(born, new + 0.05 * torch.randn(len(parents)), new).to(old.dtype)
            self._replace(name, old, nn.Parameter(new), parents, born)
        splats.slopes = torch.zeros(len(parents))
        splats.seen = torch.zeros(len(parents), dtype=torch.int64)
        return parents

    def _replace(
        self, name: str, old: Tensor, new: nn.Parameter, parents: Tensor, born: Tensor
    ) -> None:
        optimizer = self.optimizers[name]
        setattr(self.splats, name, new)
        optimizer.param_groups[0]["params"] = [new]
        state: dict[str, Any] = optimizer.state.pop(old, {})
        for key, value in state.items():
            if key != "step":
                state[key] = torch.where(born, 0, value[parents])
        if state:
            optimizer.state[new] = state


def due(step: int) -> bool:
    return step % EVERY == EVERY - 1


def build(coarse: bool = False, across: bool = False) -> tuple[Splats, dict[str, Any], Restructure]:
    splats = Splats(coarse=coarse)
    optimizers = splats.optimizers()
    return splats, optimizers, Restructure(Densify(splats, optimizers), due, across=across)


def tensors_of(splats: Splats, optimizers: dict[str, Any]) -> list[Any]:
    """Everything that law 1 compares."""
    state = [
        {key: value.clone() for key, value in sorted(base.state[p].items())}
        for base in optimizers.values()
        for p in base.param_groups[0]["params"]
    ]
    return [{k: v.detach().clone() for k, v in splats.state_dict().items()}, state]


def sequential(steps: int, seed: int = 3, coarse: bool = False) -> tuple[list[Tensor], list[Any]]:
    """The loop that a run at tolerance 0 equals bitwise."""
    splats, optimizers, restructure = build(coarse)
    losses, states = [], []
    for t in range(steps):
        with step_rng(seed, t):
            losses.append(splats.closure(t).detach())
            for base in optimizers.values():
                base.step()
            if due(t):
                restructure.function(t)
        states.append(tensors_of(splats, optimizers))
    return losses, states
