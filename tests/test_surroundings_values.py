"""What counts as a change of what a closure sees: another value of a variable, or a change in place."""

import argparse
import collections
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from picardopt.audit.surroundings import Surroundings
from tests.helpers.surroundings import Cell, Config, Trainer, halve, network, replaced


def changes(value: Any, change: Callable[[Any], object]) -> list[str]:
    """The names after a change in place; looked at once more, nothing is left."""
    cell = Cell(value)
    assert cell.changed() == []
    change(value)
    names = cell.changed()
    assert cell.changed() == []
    return names


NAN, OTHER_NAN = float("nan"), float("nan")


@pytest.mark.parametrize(
    ("old", "new", "differ"),
    [
        (1.0, 0.5, True),
        (1000.5, float("1000.5"), False),
        (NAN, OTHER_NAN, False),
        (NAN, 1.0, True),
        (0.0, -0.0, True),
        (1, 1.0, True),
        (1, True, True),
        (10**9, int("1000000000"), False),
        (complex(0, NAN), complex(0, OTHER_NAN), False),
        (complex(0, 0.0), complex(0, -0.0), True),
        ("a" * 1000, "".join(["a"] * 1000), False),
        ("train", "eval", True),
        (b"ab", b"ba", True),
        (None, False, True),
        (None, torch.zeros(2), True),
        ((1.0, "a"), (1.0, "".join(["a"])), False),
        ((1.0, 2.0), (1.0, 2.5), True),
        ((1.0,), [1.0], True),
        ([1.0, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, 2.5], True),
        ({"a": 1.0}, {"a": 1.0}, False),
        ({"a": 1.0}, {"a": 2.0}, True),
        ({"a": 1.0}, {"b": 1.0}, True),
        ({1, 2}, {2, 1}, False),
        ({1, 2}, {1, 3}, True),
        ({1, 2}, {True, 2}, True),
        (np.float32(1.5), np.float32(1.5), False),
        (np.float32(1.5), np.float64(1.5), True),
        (np.float64("nan"), np.float64("nan"), False),
        (torch.float32, torch.bfloat16, True),
        (torch.Size([2, 3]), torch.Size([2, 3]), False),
        (math.sin, math.cos, True),
        (object(), object(), True),
        (nn.Linear(2, 2), nn.Linear(2, 2), True),
        (types.SimpleNamespace(weight=1.0), types.SimpleNamespace(weight=1.0), False),
        (types.SimpleNamespace(weight=1.0), types.SimpleNamespace(weight=2.0), True),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_a_variable_with_another_value(old: Any, new: Any, differ: bool) -> None:
    assert replaced(old, new) is differ


class Slotted:
    __slots__ = ("later", "weight")

    def __init__(self) -> None:
        self.weight = 1.0


def set_(name: str, value: Any) -> Callable[[Any], None]:
    return lambda obj: setattr(obj, name, value)


IN_PLACE: dict[str, tuple[Callable[[], Any], Callable[[Any], object], list[str]]] = {
    "attribute": (Trainer, set_("weight", 0.5), ["box.weight"]),
    "new attribute": (Trainer, set_("extra", 0.5), ["box.extra"]),
    "deleted attribute": (Trainer, lambda t: delattr(t, "weight"), ["box.weight"]),
    "slot": (Slotted, set_("weight", 2.0), ["box.weight"]),
    "new slot": (Slotted, set_("later", 2.0), ["box.later"]),
    "dataclass behind": (Trainer, lambda t: setattr(t.config, "scale", 2.0), ["box.config.scale"]),
    "dataclass": (Config, set_("scale", 2.0), ["box.scale"]),
    "namespace": (lambda: argparse.Namespace(weight=1), set_("weight", 2), ["box.weight"]),
    "log": (Trainer, lambda t: t.log.append(1.0), ["box.log[0]"]),
    "item": (lambda: {"weight": 1.0}, lambda d: d.update(weight=2.0), ["box['weight']"]),
    "item gone": (lambda: {"weight": 1.0}, lambda d: d.clear(), ["box['weight']"]),
    "item of item": (
        lambda: [{"weight": 1.0}],
        lambda d: d[0].update(weight=2),
        ["box[0]['weight']"],
    ),
    "long list": (lambda: [0.0] * 1000, lambda items: items.append(1.0), ["box"]),
    "list gets long": (lambda: [0.0] * 64, lambda items: items.append(1.0), ["box"]),
    "full deque": (
        lambda: collections.deque((torch.zeros(1) for _ in range(100)), maxlen=100),
        lambda items: items.append(torch.ones(1)),
        ["box"],
    ),
    "long dict": (
        lambda: dict.fromkeys(range(100)),
        lambda items: items.update({100: None}),
        ["box"],
    ),
    "set": (lambda: {1}, lambda items: items.add(2), ["box"]),
    "tensor": (lambda: torch.ones(2), halve, ["box"]),
    "view": (lambda: torch.ones(4)[:2], lambda view: halve(view._base), ["box"]),
    "tensor in a list": (lambda: [torch.ones(2)], lambda items: halve(items[0]), ["box[0]"]),
    "tensor of an object": (
        lambda: types.SimpleNamespace(mean=torch.ones(2)),
        lambda obj: halve(obj.mean),
        ["box.mean"],
    ),
    "tensor replaced in a list": (
        lambda: [torch.ones(2)],
        lambda items: items.__setitem__(0, torch.ones(2)),
        ["box[0]"],
    ),
    "requires_grad": (lambda: torch.ones(2), lambda t: t.requires_grad_(True), ["box"]),
    "small array": (lambda: np.ones(3), lambda a: a.fill(2), ["box"]),
    "module: flag": (lambda: nn.Dropout(0.5), lambda m: m.eval(), ["box.training"]),
    "module: flag below": (network, lambda m: m[1].eval(), ["box.1.training"]),
    "module: rate below": (network, lambda m: setattr(m[1], "p", 0.1), ["box.1.p"]),
    "module: parameter": (network, lambda m: halve(m[0].weight), ["box.0.weight"]),
    "module: buffer": (network, lambda m: halve(m[2].running_mean), ["box.2.running_mean"]),
    "module: frozen": (network, lambda m: m[3].bias.requires_grad_(False), ["box.3.bias"]),
    "module: another parameter": (
        network,
        lambda m: setattr(m[3], "bias", nn.Parameter(torch.zeros(1))),
        ["box.3.bias"],
    ),
    "module: another child": (network, lambda m: m.__setitem__(1, nn.Dropout(0.5)), ["box.1"]),
    "module of an object": (Trainer, lambda t: t.target.eval(), ["box.target.training"]),
    "modules in a list": (lambda: [network()], lambda items: items[0].eval(), ["box[0].training"]),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_a_change_in_place(what: str) -> None:
    make, change, expected = IN_PLACE[what]
    names = changes(make(), change)
    assert names[: len(expected)] == expected
    assert len(names) == len(expected) or names[0].endswith(".training") or what.endswith("child")


UNSEEN: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "too deep": (Trainer, lambda t: setattr(t.deep.inner, "weight", 2.0)),
    "middle of a long list": (lambda: [0.0] * 100, lambda items: items.__setitem__(50, 1.0)),
    "large array": (lambda: np.ones(10_000), lambda array: array.fill(2)),
    "write through data": (lambda: torch.ones(2), lambda tensor: tensor.data.mul_(0.5)),
    "iterator": (lambda: iter([1, 2, 3]), next),
    "generator": (lambda: (i for i in range(3)), next),
    "stream": (torch.Generator, lambda generator: generator.manual_seed(1)),
    ".grad": (
        lambda: torch.ones(2, requires_grad=True),
        lambda tensor: setattr(tensor, "grad", torch.ones(2)),
    ),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_is_documented_as_not_seen(what: str) -> None:
    """Should one of these be seen some day, the documents are to say so."""
    make, change = UNSEEN[what]
    assert changes(make(), change) == []


def test_a_counter_does_not_hide_another_change() -> None:
    trainer = Trainer()
    cell = Cell(trainer)
    for step in range(3):
        trainer.step = step  # type: ignore[attr-defined]
        assert cell.changed() == ["box.step"]
    trainer.step = 3  # type: ignore[attr-defined]
    halve(trainer.target[0].weight)
    assert set(cell.changed()) == {"box.step", "box.target.0.weight"}


def test_a_counting_list_does_not_hide_another_change() -> None:
    items: list[Any] = [torch.ones(2), {"weight": 1.0}]
    cell = Cell(items)
    items.append(1)
    halve(items[0])
    items[1]["weight"] = 2.0
    assert set(cell.changed()) == {"box[0]", "box[1]['weight']", "box[2]"}


def test_another_object_at_the_same_address_is_another_one() -> None:
    cell = Cell(torch.zeros(3))
    for _ in range(5):
        cell.put(None)  # frees the old one, whose address the next one gets
        cell.put(torch.zeros(3))
        assert cell.changed() == ["box"]


def script(steps: int) -> Iterator[tuple[Any, ...]]:
    """The loops of the documents: what is changed when, and what closures see of it."""
    weight, target, buffer = 1.0, network(), []
    average = network()
    online = network()

    def closure(step: int) -> Any:
        return weight, target, buffer, average

    for step in range(steps):
        if step % 50 == 49:
            weight *= 0.5
        if step % 60 == 59:
            target.load_state_dict(online.state_dict())
        if step % 70 == 69:
            buffer.append(step)
        if step % 80 == 79:
            target.train(not target.training)
        if step % 90 == 89:
            with torch.no_grad():
                for a, b in zip(average.parameters(), online.parameters(), strict=True):
                    a.lerp_(b, 0.1)
        yield step, closure


def test_what_a_loop_changes_now_and_then() -> None:
    surroundings, found = Surroundings(), {}
    for step, closure in script(100):
        names = surroundings.changed(closure)
        if names:
            found[step] = names[0]
    assert found == {
        49: "weight",
        59: "target.0.weight",
        69: "buffer[0]",
        79: "target.training",
        89: "average.0.weight",
        99: "weight",
    }
