"""Looking at what a closure sees runs nothing of the user's, keeps nothing alive and fails on no object."""

import copy
import functools
import gc
import itertools
import pickle
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from picardopt.audit.surroundings import Surroundings
from tests.helpers.surroundings import Cell, Config, Trainer, network, replaced


class Hostile:
    """Fails whatever is asked of it."""

    def __init__(self) -> None:
        self.__dict__["weight"] = 1.0

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    __getattribute__ = __getattr__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __bool__(self) -> bool:
        raise AssertionError("truth")

    def __len__(self) -> int:
        raise AssertionError("length")

    __hash__ = None  # type: ignore[assignment]

    @property
    def loud(self) -> float:
        raise AssertionError("property")


def hostile() -> Hostile:
    made = object.__new__(Hostile)
    object.__getattribute__(made, "__dict__")["weight"] = 1.0
    return made


def test_nothing_of_the_users_runs() -> None:
    made = hostile()
    holder = types.SimpleNamespace(inside=made, items=[made], table={"key": made})
    cell, around = Cell(made), Cell(holder)
    assert cell.changed() == around.changed() == []
    object.__getattribute__(made, "__dict__")["weight"] = 2.0
    assert cell.changed() == ["box.weight"]
    other = hostile()
    holder.inside, holder.items[0], holder.table["key"] = other, other, other
    assert around.changed() == ["box.inside", "box.items[0]", "box.table['key']"]
    assert replaced(made, other)
    assert replaced([made], [other])
    assert replaced({"key": made}, {"key": other})


def test_objects_that_are_no_good_to_enter() -> None:
    """Arrays with an == of their own, inference tensors, sparse and meta ones, scripted modules, half-made ones."""
    with torch.inference_mode():
        inference = torch.ones(2)
    unmade = nn.Linear.__new__(nn.Linear)
    values = [
        np.array([object(), object()], dtype=object),
        inference,
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        unmade,
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        open(__file__),  # noqa: SIM115
        itertools.count(),
        weakref.ref(unmade),
        {torch.ones(1): 1},
        {(1, "a"): torch.ones(1)},
        {Config: 1},
        functools.partial(print, 1),
        super,
        NotImplemented,
    ]
    values.append(values)  # a list that holds itself
    cell = Cell(values)
    assert cell.changed() == []
    values[6].close()


def test_it_keeps_nothing_alive() -> None:
    def make() -> tuple[Any, ...]:
        model, trainer, batch = network(), Trainer(), torch.zeros(3)
        return model, trainer, batch, lambda batch=batch: (model, trainer)

    surroundings, made = Surroundings(), make()
    surroundings.changed(made[-1])
    surroundings.add_modules([nn.Sequential(made[0])])
    gone = [weakref.ref(obj) for obj in made]
    gc.disable()
    try:
        del made
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
    assert surroundings.changed(lambda: 0) == ["the closure"]


def test_a_copy_begins_anew() -> None:
    cell = Cell(torch.ones(2))
    for again in (copy.deepcopy(cell.surroundings), pickle.loads(pickle.dumps(cell.surroundings))):
        assert again.changed(cell.closure) == []
