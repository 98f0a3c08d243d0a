"""Runs whose closures call a batched function, joined and slot by slot, to be compared bit by bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from picardopt import ParallelPicardOptimizer, StepRelativeTolerance, batched
from picardopt.joint import JointEvaluation

STEPS = 24
SIZE = 4


def target(x: Tensor, level: Tensor) -> Tensor:
    """Elementwise, so that joined rows have the bits of separate ones."""
    return torch.sin(3 * x) * level - x / 2


@contextmanager
def slot_by_slot() -> Iterator[None]:
    """Sweeps as without joined calls: what joined ones are compared with."""
    real = JointEvaluation.evaluate_many
    JointEvaluation.evaluate_many = lambda *_: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        JointEvaluation.evaluate_many = real  # type: ignore[method-assign]


class KeepsAttribute(torch.autograd.Function):
    """Keeps what it needs beside `save_for_backward`, as many renderers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * ctx.weight, (grads[0] * ctx.x).sum(0)


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return KeepsAttribute.apply(x, self.weight)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.3), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None])[:, 0]


class Flat(nn.Module):
    """Layers whose weights are views of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(2 * SIZE * SIZE) / 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.flat.view(2, SIZE, SIZE)
        return torch.tanh(x @ first.T) @ second.T


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "conv": Convolution,
    "attribute": Attribute,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "batchnorm": lambda: nn.BatchNorm1d(SIZE),
    "dropout": lambda: nn.Dropout(0.2),
    "views of one": Flat,
}


class Scene(nn.Module):
    """Layers around a call, whose graph must survive it."""

    def __init__(self, layer: str = "linear", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Linear(SIZE, SIZE), LAYERS[layer](), nn.Tanh())
            self.second = nn.Sequential(LAYERS[layer](), nn.Linear(SIZE, SIZE))
        self.double()

    def view(self, rows: int = 3) -> Tensor:
        return self.first(torch.randn(rows, SIZE, dtype=torch.float64))


Loss = Callable[[Scene, Callable[..., Any], int], Tensor]


def one_call(scene: Scene, score: Callable[..., Any], step: int) -> Tensor:
    """Draws before and after the call, and uses both halves of the graph."""
    seen = scene.view()
    wanted = score(seen.detach(), torch.rand(3, 1, dtype=torch.float64))
    noise = torch.randn_like(seen)
    return (scene.second(seen) - wanted + 0.1 * noise).square().mean()


def two_calls(scene: Scene, score: Callable[..., Any], step: int) -> Tensor:
    seen = scene.view()
    wanted = score(seen.detach(), torch.rand(3, 1, dtype=torch.float64))
    after = scene.second(seen)
    again = score(after.detach(), torch.rand(3, 1, dtype=torch.float64))
    again.mul_(0.5)  # each slot's rows are its own
    return (seen - wanted).square().mean() + (after - again).square().mean()


def backward_before(scene: Scene, score: Callable[..., Any], step: int) -> Tensor:
    """Gradients stand in ``.grad`` while the slot waits."""
    scene.view().square().mean().backward()
    return one_call(scene, score, step)


def varying(scene: Scene, score: Callable[..., Any], step: int) -> Tensor:
    """Other numbers of rows, other shapes and no call at all, by step."""
    if step % 5 == 4:
        return scene.second(scene.view()).square().mean()
    seen = scene.view(1 + step % 3)
    pieces = seen.detach().reshape(len(seen), 1 + (step + 1) // 2 % 2, -1)
    level = torch.rand(len(seen), 1, 1, dtype=torch.float64)
    wanted = score(pieces, level).reshape(seen.shape)
    return (scene.second(seen) - wanted).square().mean()


LOSSES: dict[str, Loss] = {
    "one": one_call,
    "two": two_calls,
    "backward before": backward_before,
    "varying": varying,
}


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    stats: Any = None


def run(
    scene: Scene,
    loss: Loss = one_call,
    score: Callable[..., Any] | None = None,
    base: type[torch.optim.Optimizer] = torch.optim.Adam,
    steps: int = STEPS,
    **options: Any,
) -> Result:
    """A run at a step-relative tolerance, unless the options say otherwise."""
    score = batched(target) if score is None else score
    tolerance = options.pop("tolerance", StepRelativeTolerance(0.1))
    optimizer = ParallelPicardOptimizer(
        base(scene.parameters(), lr=0.01),  # type: ignore[call-arg]
        tolerance=tolerance,
        **{"window": 4, "carry": scene, "total_steps": steps, **options},
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        found = loss(scene, score, step)
        found.backward()
        return found

    result = Result(stats=optimizer.stats)
    for _ in range(steps):
        result.losses.append(float(optimizer.step(closure)))
    result.parameters = [p.detach().clone() for p in [*scene.parameters(), *scene.buffers()]]
    result.strides = optimizer.stats.strides
    return result


def assert_same(got: Result, expected: Result) -> None:
    assert got.losses == expected.losses
    assert got.strides == expected.strides
    for a, b in zip(got.parameters, expected.parameters, strict=True):
        assert torch.equal(a, b)
