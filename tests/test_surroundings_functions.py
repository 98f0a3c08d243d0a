"""What a closure sees through globals, methods, defaults, the functions that it calls, and modules."""

import functools
import types
from typing import Any

import pytest
import torch

from picardopt.audit.surroundings import Surroundings
from tests.helpers import surroundings as helpers
from tests.helpers.surroundings import Cell, Config, Trainer, halve, network

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
    monkeypatch.setattr(helpers, "scale", 2.0)
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
