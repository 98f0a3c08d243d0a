"""Decides what of a closure's surroundings is entered, and looks at all of it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt.audit.surroundings import readers
from picardopt.audit.surroundings.policy import ITSELF
from picardopt.audit.surroundings.values import (
    CONTAINERS,
    MISSING,
    MOST_ITEMS,
    Label,
    Space,
    Stamp,
    is_plain,
)

MOST_FUNCTIONS = 64
MOST_ATTRIBUTES = 256
_RECORDS = (types.SimpleNamespace, argparse.Namespace)
_WRAPPERS = (types.FunctionType, types.MethodType, functools.partial)
_PATHS = sysconfig.get_paths()
_PACKAGES = ("/site-packages/", "/dist-packages/")  # of this environment, another one, a user's own
_LIBRARIES = (_PATHS["stdlib"], _PATHS["purelib"], _PATHS["platlib"], "<frozen")


class Surroundings:
    """What a closure can see besides its parameters and step, as far as that can be compared cheaply.

    It follows one list of parameters: where that changes, make a new one. A copy, or an unpickled one, begins anew.

    Args:
        own: What is the optimizer's own business: its parameters and the carry, and other objects not to be entered.
            Kept by their addresses: the caller keeps them alive.
    """

    def __init__(self, own: Iterable[object] = ()) -> None:
        own = list(own)
        self._own = {id(obj) for obj in own}
        self._storages = {_storage(obj) for obj in own if isinstance(obj, Tensor)} - {0}
        self._ran: list[tuple[weakref.ref[nn.Module], Space]] = []
        self.forget()

    def __reduce__(self) -> tuple[type[Surroundings], tuple[()]]:
        return Surroundings, ()

    def forget(self) -> None:
        """Forgets the closure: the next look only takes in what is there."""
        self._root: Stamp | Space | None = None
        self._followed: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
        self._entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._attributes: dict[str, None] = {}
        self._inside: set[int] = set()

    def changed(self, closure: Callable[..., Any]) -> list[str]:
        """Names what differs from the last look, which this one replaces.

        To be called before a queued drift is used, with the closure of that very call; and after the closure was
        evaluated, so that what it changed itself is not taken for the loop's doing (that is the audit's business).

        Args:
            closure: What ``step`` was given; a new function of the same code counts as the same one.

        Returns:
            The names, each once; none at the first look.
        """
        names: list[str] = []
        if self._root is None or not self._root.takes(closure):
            if self._root is not None:
                names.append(ITSELF)
            self.forget()
            self._root = self._enter_closure(closure)
        else:
            self._root.look(closure, names)
        for ref, space in self._ran:
            module = ref()
            if module is not None:
                space.look(module, names)
        return list(dict.fromkeys(names))

    def add_modules(self, modules: Iterable[nn.Module]) -> None:
        """Looks at further modules from now on: those that ran in the closure, however it reached them."""
        known = {id(ref()) for ref, _ in self._ran}
        for module in modules:
            if (
                module not in self._entered
                and id(module) not in known
                and readers.is_module(module)
            ):
                self._ran.append(
                    (weakref.ref(module), self._module(type(module).__name__, module, 2))
                )

    def watch(self, name: str, value: Any, level: int) -> Stamp | Space | None:
        """How to look into a value; None if its identity, or a plain value's content, says it all.

        Args:
            name: What it is called.
            value: Something that the closure reaches.
            level: How deep it lies: 0 for a variable of a function.
        """
        kind = type(value)
        if is_plain(value) or id(value) in self._own or value is MISSING:
            return None
        if issubclass(kind, (Tensor, Optimizer, LRScheduler)):
            return None
        if issubclass(kind, np.ndarray):
            return Stamp(name, value, readers.array_stamp, itself=True)
        if issubclass(kind, (set, frozenset)):
            return Stamp(name, value, readers.set_stamp, itself=False)
        if issubclass(kind, CONTAINERS):
            return self._container(name, value, level)
        if issubclass(kind, nn.Module):
            entered = level <= 2 and readers.is_module(value)
            return self._module(name, value, level) if entered else None
        if issubclass(kind, _WRAPPERS):
            return self._callable(name, value, level)
        if issubclass(kind, (type, types.ModuleType)):
            return self._named(name, value, level)
        record = dataclasses.is_dataclass(kind) or issubclass(kind, _RECORDS)
        if level == 0 or (record and level == 1):
            return self._object(value, _dotted(name), level, itself=not record)
        return None

    def _named(self, name: str, value: type | types.ModuleType, level: int) -> Space | None:
        """Enters a class of the user's or a module, unless this is inside of it: `torch.torch` is torch."""
        # A module of a class of its own, such as transformers', may import what it is asked for.
        enter = _is_users(value) if isinstance(value, type) else type(value) is types.ModuleType
        if id(value) in self._inside or not enter:
            return None
        self._inside.add(id(value))
        try:
            read = readers.NamedReader(value, self._attributes)
            return Space(self, value, read, _dotted(name), level, itself=True)
        finally:
            self._inside.discard(id(value))

    def counts_writes(self, value: Any) -> bool:
        """Whether this is a tensor whose writes in place are counted, by others than the optimizer."""
        if not issubclass(type(value), Tensor) or id(value) in self._own or value.is_inference():
            return False
        return _storage(value) not in self._storages

    def _enter_closure(self, closure: Callable[..., Any]) -> Stamp | Space | None:
        """The closure itself: entered wherever its code lies, and compared by what it holds."""
        kind = type(closure)
        if isinstance(closure, types.FunctionType):
            return self._function(closure, lambda key: key[1])
        if issubclass(kind, _WRAPPERS) or readers.is_module(closure):
            return self.watch("the closure", closure, 0)
        self._attributes["__call__"] = None
        return self._object(closure, _dotted("self"), 0, itself=False)

    def _function(self, function: types.FunctionType, label: Label) -> Space:
        self._followed.add(function)
        self._attributes.update(readers.names_in(function.__code__).attributes)
        return Space(self, function, readers.FunctionReader(function), label, -1)

    def _callable(self, name: str, value: Any, level: int) -> Space | None:
        if isinstance(value, types.MethodType):
            return Space(self, value, readers.method, str, -1) if level <= 0 else None
        if isinstance(value, functools.partial):
            return Space(self, value, readers.partial, _part(name), -1)
        if value in self._followed or len(self._followed) >= MOST_FUNCTIONS:
            return None
        if _is_users(value):
            return self._function(value, _variable(value.__name__))
        if "__wrapped__" in vars(
            value
        ):  # a library's decorator around, perhaps, the user's function
            return Space(self, value, readers.attributes, _part(name), -1)
        return None

    def _container(self, name: str, value: Any, level: int) -> Space | None:
        plain_keys = not isinstance(value, dict) or all(map(is_plain, dict.keys(value)))
        if len(value) > MOST_ITEMS or not plain_keys:
            return Space(self, value, readers.ends, lambda key: name, 3, itself=True)
        return Space(self, value, readers.items, _item(name), level) if level <= 3 else None

    def _module(self, name: str, module: nn.Module, level: int) -> Space:
        read = readers.ModuleReader(module, self._attributes)
        self._entered.update(read.modules())
        # Children are listed already, one by one: what is entered below is too deep for modules.
        return Space(self, module, read, _dotted(name), 2, itself=True)

    def _object(self, value: object, label: Label, level: int, *, itself: bool) -> Space | None:
        read = readers.ObjectReader(value, self._attributes if level == 0 else ())
        keys, _ = read(value)
        if not 0 < len(keys) <= MOST_ATTRIBUTES:
            return None
        return Space(self, value, read, label, level, itself=itself)


def _dotted(name: str) -> Label:
    return lambda key: f"{name}.{key}"


def _item(name: str) -> Label:
    return lambda key: f"{name}[{key!r}]"


def _part(name: str) -> Label:
    return lambda key: f"{name}'s {key}"


def _variable(function: str) -> Label:
    return lambda key: key[1] if key[0] == "global" else f"{function}.{key[1]}"


def _storage(value: Any) -> int:
    """Where a tensor's memory begins; 0 if that is not known."""
    try:
        return int(value.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # some subclasses, sparse tensors
        return 0


def _is_users(value: Any) -> bool:
    """Whether a function or a class was written in no installed library."""
    if isinstance(value, type):
        file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""
    else:
        file = value.__code__.co_filename
    return not (file.startswith(_LIBRARIES) or any(folder in file for folder in _PACKAGES))
