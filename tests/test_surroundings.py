"""What a closure can see is compared, by name; nothing of the user's runs for it."""

import argparse
import collections
import copy
import dataclasses
import functools
import gc
import itertools
import math
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from picardopt.audit.surroundings import Drop, Keep, OuterChanges, Recheck, Surroundings


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


def changes(value: Any, change: Callable[[Any], object]) -> list[str]:
    """The names after a change in place; looked at once more, nothing is left."""
    cell = Cell(value)
    assert cell.changed() == []
    change(value)
    names = cell.changed()
    assert cell.changed() == []
    return names


def replaced(old: Any, new: Any) -> bool:
    """Whether another value of a variable counts as a change."""
    cell = Cell(old)
    cell.put(new)
    names = cell.changed()
    assert cell.changed() == []
    assert names in ([], ["box"]) or all(name.startswith("box") for name in names)
    return bool(names)


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


class Slotted:
    __slots__ = ("later", "weight")

    def __init__(self) -> None:
        self.weight = 1.0


def set_(name: str, value: Any) -> Callable[[Any], None]:
    return lambda obj: setattr(obj, name, value)


@torch.no_grad()
def halve(tensor: Tensor) -> None:
    tensor.mul_(0.5)


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


scale: Any = 1.0
unused = 1.0


def helper(step: int) -> float:
    return deeper(step)


def deeper(step: int, rate: float = 1.0) -> float:
    return scale * rate


def uses_global(step: int) -> float:
    return sum(scale for _ in range(3))


def test_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings = Surroundings()
    assert surroundings.changed(uses_global) == []
    monkeypatch.setitem(globals(), "unused", 2.0)
    assert surroundings.changed(uses_global) == []
    monkeypatch.setitem(globals(), "scale", 2.0)
    assert surroundings.changed(uses_global) == ["scale"]
    monkeypatch.delitem(globals(), "scale")
    assert surroundings.changed(uses_global) == ["scale"]
    monkeypatch.setitem(globals(), "range", range)  # hides the builtin of that name
    assert surroundings.changed(uses_global) == ["range"]


def test_globals_of_functions_that_the_closure_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def closure(step: int) -> float:
        return helper(step)

    surroundings = Surroundings()
    assert surroundings.changed(closure) == []
    monkeypatch.setitem(globals(), "scale", 2.0)
    assert surroundings.changed(closure) == ["scale"]
    monkeypatch.setattr(deeper, "__defaults__", (2.0,))
    assert surroundings.changed(closure) == ["deeper.rate"]
    monkeypatch.setattr(deeper, "__defaults__", None)
    assert surroundings.changed(closure) == ["deeper.rate"]


def test_methods_and_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, surroundings = Trainer(), Surroundings()
    assert surroundings.changed(trainer.closure) == []
    trainer.weight = 0.5
    assert surroundings.changed(trainer.closure) == ["self.weight"]
    monkeypatch.setitem(globals(), "scale", 2.0)
    assert surroundings.changed(trainer.closure) == ["scale"]
    assert surroundings.changed(trainer.closure) == []
    assert "self" in surroundings.changed(Trainer().closure)


def test_a_callable_object() -> None:
    trainer, surroundings = Trainer(), Surroundings()
    assert surroundings.changed(trainer) == []
    trainer.weight = 0.5
    assert surroundings.changed(trainer) == ["self.weight"]


def test_a_module_as_closure() -> None:
    module, surroundings = network(), Surroundings()
    assert surroundings.changed(module) == []
    halve(module[0].weight)
    assert surroundings.changed(module) == ["the closure.0.weight"]


def test_partials_and_decorators() -> None:
    def work(config: Config, step: int, *, factor: float = 1.0) -> float:
        return config.scale * weight * factor

    weight, config = 1.0, Config()
    made = functools.partial(work, config, factor=2.0)
    surroundings = Surroundings()
    assert surroundings.changed(made) == []
    weight = 2.0
    assert surroundings.changed(made) == ["work.weight"]
    config.scale = 2.0
    assert surroundings.changed(functools.partial(work, config, factor=2.0)) == [
        "the closure's arguments[0].scale"
    ]
    assert surroundings.changed(functools.partial(work, config, factor=3.0)) == [
        "the closure's keywords['factor']"
    ]
    cached, surroundings = functools.lru_cache(work), Surroundings()
    assert surroundings.changed(cached) == []
    weight = 3.0
    assert surroundings.changed(cached) == ["work.weight"]
    under, surroundings = torch.no_grad()(work), Surroundings()
    assert surroundings.changed(under) == []
    weight = 4.0
    assert surroundings.changed(under) == ["work.weight"]


def test_a_new_function_of_the_same_code_is_the_same_closure() -> None:
    surroundings, names = Surroundings(), []
    batch = torch.zeros(2)
    for step in range(4):
        weight = 1.0 if step < 3 else 0.5
        closure = lambda batch=batch, *, rate=1.0: batch * weight * rate  # noqa: E731, B023
        closure.note = step // 2  # type: ignore[attr-defined]
        names.append(surroundings.changed(closure))
    assert names == [[], [], ["attributes['note']"], ["weight"]]
    assert surroundings.changed(lambda batch=batch, *, rate=1.0: batch * rate) == ["the closure"]


def test_defaults() -> None:
    surroundings = Surroundings()
    names = [
        surroundings.changed(lambda step, batch=batch, *, rate=rate: batch * rate)
        for batch, rate in [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)]
    ]
    assert names[:2] == [[], ["batch"]]
    assert names[2] == ["keywords['rate']"]


def test_two_closures_taken_in_turn() -> None:
    surroundings = Surroundings()
    weight = 1.0
    first, second = lambda: weight, lambda: -weight
    assert surroundings.changed(first) == []
    assert surroundings.changed(second) == ["the closure"]
    assert surroundings.changed(first) == ["the closure"]
    weight = 2.0
    assert surroundings.changed(first) == ["weight"]


def test_an_empty_cell() -> None:
    def closure() -> Any:
        return later

    surroundings = Surroundings()
    assert surroundings.changed(closure) == []
    later = 1.0
    assert surroundings.changed(closure) == ["later"]


def test_imported_modules_and_classes_by_the_names_that_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = types.ModuleType("settings")
    settings.weight, settings.other = 1.0, 1.0  # type: ignore[attr-defined]

    def closure() -> Any:
        return settings.weight * Config.scale

    surroundings = Surroundings()
    assert surroundings.changed(closure) == []
    settings.other = 2.0  # type: ignore[attr-defined]
    assert surroundings.changed(closure) == []
    settings.weight = 2.0  # type: ignore[attr-defined]
    assert surroundings.changed(closure) == ["settings.weight"]
    monkeypatch.setattr(Config, "scale", 3.0)
    assert surroundings.changed(closure) == ["Config.scale"]


class LazyModule(types.ModuleType):
    """As transformers and diffusers are: an attribute is imported when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module {self.__name__} has no attribute {name}")


def test_a_module_of_a_class_of_its_own_is_one_object() -> None:
    lazy = LazyModule("lazy")
    cell = Cell(lazy)
    assert cell.changed() == []
    cell.put(LazyModule("lazy"))
    assert cell.changed() == ["box"]


@pytest.mark.parametrize(
    ("file", "entered"),
    [
        ("/opt/env/lib/python3.10/site-packages/lib/a.py", False),
        ("/usr/lib/python3/dist-packages/lib/a.py", False),
        ("/home/someone/.local/lib/python3.12/site-packages/lib/a.py", False),
        ("/home/someone/train.py", True),
    ],
)
def test_functions_of_libraries_are_not_entered_wherever_these_lie(
    file: str, entered: bool
) -> None:
    """Beside this environment too: a virtual one that sees the system's packages, a user's own ones."""
    names = {"weight": 1.0}
    exec(compile("def function(): return weight", file, "exec"), names)
    cell = Cell(names["function"])
    names["weight"] = 2.0
    assert bool(cell.changed()) is entered


def test_modules_that_contain_themselves() -> None:
    """As torch does, in a function that names an attribute "torch", or two modules each other."""
    first, second = types.ModuleType("first"), types.ModuleType("second")
    first.second, second.first = second, first  # type: ignore[attr-defined]
    second.weight = 1.0  # type: ignore[attr-defined]

    def closure() -> Any:
        return torch.torch.zeros(1) + first.second.first.second.weight  # type: ignore[attr-defined]

    assert vars(torch)["torch"] is torch
    surroundings = Surroundings()
    assert surroundings.changed(closure) == []
    second.weight = 2.0  # type: ignore[attr-defined]
    assert surroundings.changed(closure) == ["first.second.weight"]
    second.first = types.ModuleType("third")  # type: ignore[attr-defined]
    assert surroundings.changed(closure) == ["first.second.first"]
    second.first = first  # type: ignore[attr-defined]
    assert surroundings.changed(closure) == ["first.second.first"]
    assert surroundings.changed(closure) == []


def test_the_optimizers_own_business_is_left_out() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    flat = model[0].weight.detach()[0]  # a view: its writes are the optimizer's

    def closure() -> Any:
        return optimizer, scheduler, model, flat

    carry = [*model.buffers()]
    surroundings = Surroundings([*model.parameters(), *carry])
    assert surroundings.changed(closure) == []
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert surroundings.changed(closure) == []
    model.eval()
    assert surroundings.changed(closure)[0] == "model.training"


def test_modules_that_ran() -> None:
    hidden = network()
    registry = {"deep": types.SimpleNamespace(inner=types.SimpleNamespace(model=hidden))}

    def closure() -> Any:
        return registry["deep"].inner.model

    surroundings = Surroundings()
    surroundings.changed(closure)
    surroundings.add_modules([hidden])
    surroundings.add_modules([hidden])
    assert surroundings.changed(closure) == []
    hidden.eval()
    assert surroundings.changed(closure)[0] == "Sequential.training"
    surroundings.forget()
    assert surroundings.changed(closure) == []
    halve(hidden[0].weight)
    assert surroundings.changed(closure) == ["Sequential.0.weight"]


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


# -- the policy ---------------------------------------------------------------------------------------------


def test_no_change_keeps_the_queue() -> None:
    policy = OuterChanges()
    for exact, queued in itertools.product([True, False], repeat=2):
        assert policy.look([], exact=exact, queued=queued) == Keep()
    assert policy.dropped == 0
    assert policy.message() is None


def test_tolerance_zero_drops_at_any_change() -> None:
    policy = OuterChanges()
    assert policy.look(["weight"], exact=True, queued=True) == Drop(("weight",))
    assert "`weight`" in (policy.message() or "")
    assert policy.look(["weight"], exact=True, queued=True) == Drop(("weight",))
    assert policy.message() is None  # said once
    assert (policy.dropped, policy.names["weight"]) == (2, 2)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_dropped_where_nothing_is_queued(exact: bool) -> None:
    policy = OuterChanges()
    assert policy.look(["weight"], exact=exact, queued=False) == Keep()
    assert policy.dropped == 0


def test_what_does_no_harm_is_looked_at_once() -> None:
    policy = OuterChanges()
    assert policy.look(["step", "log"], exact=False, queued=True) == Recheck(("step", "log"))
    policy.harmless(["step", "log"])
    for _ in range(20):
        assert policy.look(["step", "log"], exact=False, queued=True) == Keep()
    assert policy.look(["step", "weight"], exact=False, queued=True) == Recheck(("weight",))
    policy.harmful(["weight"])
    assert policy.look(["step"], exact=False, queued=True) == Keep()
    text = policy.message() or ""
    assert "`weight`" in text
    assert "step`" not in text
    assert policy.dropped == 1
    # A tolerance that is set to 0 later holds for all names.
    assert policy.look(["step"], exact=True, queued=True) == Drop(("step",))


def test_an_innocent_name_beside_a_harmful_one_gets_another_look() -> None:
    policy = OuterChanges()
    policy.look(["step", "weight"], exact=False, queued=True)
    policy.harmful(["step", "weight"])
    assert policy.look(["step"], exact=False, queued=True) == Recheck(("step",))
    policy.harmless(["step"])
    assert policy.look(["step"], exact=False, queued=True) == Keep()


@pytest.mark.parametrize("exact", [True, False])
def test_a_change_at_every_step_is_said_with_the_remedy(exact: bool) -> None:
    policy, texts = OuterChanges(), []
    for _ in range(30):
        if isinstance(policy.look(["batch"], exact=exact, queued=True), Recheck):
            policy.harmful(["batch"])
        texts.append(policy.message())
    said = [text for text in texts if text]
    assert len(said) == 2
    assert "closure(step)" in said[1]
    assert "`batch`" in said[1]
    assert policy.dropped == 30


def test_now_and_then_is_not_every_step() -> None:
    policy = OuterChanges()
    for step in range(300):
        policy.look(["weight"] if step % 50 == 49 else [], exact=True, queued=True)
    assert policy.dropped == 6
    assert "between two steps" in (policy.message() or "")


def test_long_lists_of_names_are_cut() -> None:
    policy = OuterChanges()
    policy.look([f"target.{index}.weight" for index in range(40)], exact=True, queued=True)
    assert "and 37 more" in (policy.message() or "")
