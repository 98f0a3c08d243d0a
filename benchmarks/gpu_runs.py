"""Small runs on a device, sequential and by Picard iteration, for `gpu_smoke.py` to compare and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from picardopt import ParallelPicardOptimizer, step_rng

STEPS = 24
WINDOW = 6
SEED = 3


@dataclass(frozen=True)
class Outcome:
    """The result of a run: tensors on the host, in a fixed order."""

    tensors: list[torch.Tensor]
    strides: list[int]
    sweeps: int

    def differs_from(self, other: Outcome) -> int:
        """How many tensors differ in any bit."""
        if len(self.tensors) != len(other.tensors):
            return max(len(self.tensors), len(other.tensors))
        pairs = zip(self.tensors, other.tensors, strict=True)
        return sum(not torch.equal(bits(a), bits(b)) for a, b in pairs)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def network(device: torch.device) -> tuple[torch.nn.Module, Callable]:
    """A small network with dropout, on data drawn on the device: hardly any guess is right."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Dropout(0.2)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 8)).to(device)

    def loss() -> torch.Tensor:
        inputs = torch.randn(16, 32, device=device)  # [batch, features]
        return model(inputs).square().mean()

    return model, loss


def signs(device: torch.device) -> tuple[torch.nn.Module, Callable]:
    """A problem whose gradient hardly ever depends on the parameters: guesses are right, so strides are long."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 4).to(device)
    far = 100.0  # the kink of |w - far * direction| is never reached

    def loss() -> torch.Tensor:
        targets = far * torch.randn_like(model.weight).sign()
        return (model.weight - targets).abs().mean() + model.bias.abs().mean()

    return model, loss


PROBLEMS = {"network": network, "signs": signs}


def optimizers(device: torch.device) -> dict[str, dict]:
    """Adam's keyword arguments by name: one for each kind of kernel."""
    kinds = {
        "loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
        "amsgrad": {"foreach": True, "amsgrad": True},
    }
    if device.type == "cuda":
        kinds["capturable"] = {"foreach": True, "capturable": True}
        kinds["fused, capturable"] = {"fused": True, "capturable": True}
    return kinds


def train(problem: str, options: dict, device: torch.device, window: int | None) -> Outcome:
    """Trains sequentially (`window` 0) or by Picard iteration (None: one slot per rank)."""
    model, compute_loss = PROBLEMS[problem](device)
    base = torch.optim.Adam(model.parameters(), lr=1e-2, **options)

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss

    losses, strides, sweeps = [], [], 0
    if window == 0:
        for step in range(STEPS):
            with step_rng(SEED, step):
                losses.append(closure().detach())
                base.step()
    else:
        optimizer = ParallelPicardOptimizer(
            base, window=window, tolerance=0, total_steps=STEPS, seed=SEED
        )
        losses = [optimizer.step(closure) for _ in range(STEPS)]
        strides, sweeps = list(optimizer.stats.strides), optimizer.stats.sweeps
    state = [
        value
        for parameter in model.parameters()
        for _, value in sorted(base.state[parameter].items())
        if isinstance(value, torch.Tensor)
    ]
    found = [*model.parameters(), *losses, *state]
    return Outcome([t.detach().cpu() for t in found], strides, sweeps)
