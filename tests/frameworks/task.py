"""One small task for every framework: a network with dropout, a shuffled loader, batches also by step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import WarningMessage, catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from picardopt import ParallelPicardOptimizer, PicardWarning, StepIndexedLoader, step_rng
from tests.helpers.problems import quantize

BATCHES = 6
"""Batches of an epoch."""


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points and the sum of their sines."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return x, x.sin().sum(0, keepdim=True)


class Network(nn.Module):
    """Quantized weights, so that guesses are right at tolerance 0 (see ``problems``), and dropout."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(1, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(x @ quantize(self.first).T), 0.2, self.training)
        return hidden @ quantize(self.second).T


class Normalized(Network):
    """With statistics that have to be made anew for an average of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def make_loader() -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        Points(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
    )


def loss_of(model: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def make_base(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3)


def wrap(base: torch.optim.Optimizer, window: int = 4, **options: Any) -> ParallelPicardOptimizer:
    return ParallelPicardOptimizer(base, window=window, tolerance=0, **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def sequential(steps: int, use: Callable[[nn.Module], Any] = lambda model: model) -> list[Tensor]:
    """Final weights of the loop that looks nothing ahead, over batches by step.

    Args:
        steps: How many.
        use: Turns the network into what the closure calls (autocast, compiled, ...).
    """
    model = Network()
    base, loader, called = make_base(model), StepIndexedLoader(make_loader()), use(model)
    for t in range(steps):
        with step_rng(0, t):
            base.zero_grad()
            loss_of(called, loader.batch(t)).backward()
            base.step()
    return weights(model)


def run_ahead(
    model: nn.Module, optimizer: Any, steps: int = 2 * BATCHES, called: Any = None
) -> None:
    """The README's loop."""
    loader = StepIndexedLoader(make_loader())
    called = model if called is None else called

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(called, loader.batch(step))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@contextmanager
def recorded() -> Iterator[list[WarningMessage]]:
    """Lists the wrapper's warnings, repetitions at one line included; others stay what they are."""
    with catch_warnings(record=True) as all_of_them:
        simplefilter("always", PicardWarning)
        ours: list[WarningMessage] = []
        yield ours
        ours += [w for w in all_of_them if issubclass(w.category, PicardWarning)]


def assert_told_once(ours: list[WarningMessage], file: str, line: str, *words: str) -> None:
    """One warning, at a line of the test file that holds `line`, naming the remedy."""
    assert len(ours) == 1, [str(w.message) for w in ours]
    assert ours[0].filename == file
    assert line in Path(file).read_text().splitlines()[ours[0].lineno - 1]
    for word in ("nothing runs ahead", "StepIndexedLoader", *words):
        assert word in str(ours[0].message)
