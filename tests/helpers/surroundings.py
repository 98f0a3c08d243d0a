"""Closures over one variable, and objects that they may see."""

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn

from picardopt.audit.surroundings import Surroundings

scale: Any = 1.0
"""What `Trainer` reads beside its own attributes."""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Cell:
    """A closure over one variable that the test sets."""

    def __init__(self, value: Any) -> None:
        box = value

        def closure(step: int) -> Any:
            return box

        def put(new: Any) -> None:
            nonlocal box
            box = new

        self.closure, self.put = closure, put
        self.surroundings = Surroundings()
        assert self.changed() == []

    def changed(self) -> list[str]:
        return self.surroundings.changed(self.closure)


def replaced(old: Any, new: Any) -> bool:
    """Whether another value of a variable counts as a change."""
    cell = Cell(old)
    cell.put(new)
    names = cell.changed()
    assert cell.changed() == []
    assert names in ([], ["box"]) or all(name.startswith("box") for name in names)
    return bool(names)


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    sizes: tuple[int, ...] = (1, 2)


class Trainer:
    def __init__(self) -> None:
        self.weight = 1.0
        self.config = Config()
        self.log: list[float] = []
        self.deep = types.SimpleNamespace(inner=types.SimpleNamespace(weight=1.0))
        self.target = network()

    def closure(self, step: int) -> float:
        return self.inner()

    def inner(self) -> float:
        return self.weight * scale

    def __call__(self) -> float:
        return self.weight


@torch.no_grad()
def halve(tensor: Tensor) -> None:
    tensor.mul_(0.5)
