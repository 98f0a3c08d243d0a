"""What is remembered of a closure's surroundings, and how it is compared with what is there now.

Nothing of the user's runs for it: ``==`` is asked of plain values only, other objects are told apart by identity.
"""

from __future__ import annotations

import struct
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

MOST_ITEMS = 64
"""Items of a container that are compared one by one."""
CONTAINERS = (list, tuple, deque, dict)
MISSING = types.SimpleNamespace()
"""Stands for an empty cell, or for a global or a slot that is not there."""
_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, range, types.CodeType)
_PLAIN_TYPES = frozenset((*_PLAIN, torch.dtype, torch.device, torch.layout))
_NEW = (types.SimpleNamespace(), None)

Contents = tuple[Sequence[Any], list[Any]]
"""The keys and the values of something that is entered; a tuple of keys is the same one each time."""
Reader = Callable[[Any], Contents]
"""Gives the contents of an object. One that remembers how has a method `again` for when they do not fit."""
Label = Callable[[Any], str]
"""The name of the value of a key."""


class Plan(Protocol):
    """Decides what is entered."""

    def watch(self, name: str, value: Any, level: int) -> Stamp | Space | None:
        """How to look into a value; None if its identity, or a plain value's content, says it all."""

    def counts_writes(self, value: Any) -> bool:
        """Whether this is a tensor whose writes in place are counted, by others than the optimizer."""


class _Weak(weakref.ref):  # type: ignore[type-arg]
    """A reference of ours, not a value of the user's."""

    __slots__ = ()


def is_plain(value: object) -> bool:
    """Whether a value is compared by its type and content: it cannot change in place."""
    kind = type(value)
    if kind in _PLAIN_TYPES or issubclass(kind, np.generic):
        return True
    if kind is not tuple and kind is not torch.Size:
        return False
    items: tuple[Any, ...] = value  # type: ignore[assignment]
    return len(items) <= MOST_ITEMS and all(map(is_plain, items))


def same_plain(a: Any, b: Any) -> bool:
    """Whether two plain values have the same type and content: NaN is NaN, 0.0 is not -0.0, True is not 1."""
    kind = type(a)
    if a is b or kind is not type(b):
        return a is b
    if kind is float:
        return struct.pack("d", a) == struct.pack("d", b)
    if kind is complex:
        return struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
    if kind is tuple or kind is torch.Size:
        return len(a) == len(b) and all(map(same_plain, a, b))
    if issubclass(kind, np.generic):
        return bool(a.dtype == b.dtype) and a.tobytes() == b.tobytes()
    return bool(a == b)


def _hold(value: Any) -> Any:
    """What is remembered of a value: a plain one itself, of another one a weak reference if it can have one."""
    if is_plain(value):
        return value
    try:
        return _Weak(value)
    except TypeError:
        return value


def _same(held: Any, value: Any) -> bool:
    if type(held) is _Weak:
        return held() is value
    return held is value or (is_plain(held) and is_plain(value) and same_plain(held, value))


class Stamp:
    """Something that is compared as a whole.

    Args:
        name: What it is called.
        value: The object.
        stamp: Makes something comparable of it.
        itself: Whether another object with the same stamp is another one.
    """

    def __init__(self, name: str, value: Any, stamp: Callable[[Any], Any], *, itself: bool) -> None:
        self._name, self._stamp, self._kind = name, stamp, type(value)
        self._held = _hold(value) if itself else None
        self._before = stamp(value)

    def takes(self, value: object) -> bool:
        """Whether a value can be compared here."""
        return type(value) is self._kind and (self._held is None or _same(self._held, value))

    def look(self, value: Any, changed: list[str]) -> None:
        """Appends its name if it differs from the last look, which this one replaces."""
        now = self._stamp(value)
        if now != self._before:
            self._before = now
            changed.append(self._name)


class Space:
    """Something that is entered: the variables of a function, the attributes of an object, the items of a list.

    Args:
        plan: Decides what lies deeper.
        value: The object.
        read: Gives its keys and values.
        label: Names them.
        level: How deep it lies.
        itself: Whether another object with the same content is another one.
    """

    def __init__(
        self,
        plan: Plan,
        value: Any,
        read: Reader,
        label: Label,
        level: int,
        *,
        itself: bool = False,
    ) -> None:
        self._plan, self._read, self._label, self._level = plan, read, label, level
        self._kind, self._held = type(value), _hold(value) if itself else None
        self._few = not itself and issubclass(self._kind, CONTAINERS)
        self._code = value.__code__ if self._kind is types.FunctionType else None
        self._keys: Sequence[Any] = ()
        self._kept: list[Any] = []
        self._tensors: list[int] = []
        self._stamps: list[tuple[int, bool]] = []
        self._inner: list[tuple[int, Stamp | Space]] = []
        self._update(*read(value), [])

    def takes(self, value: Any) -> bool:
        """Whether a value can be compared here."""
        if type(value) is not self._kind:
            return False
        if self._held is not None:
            return _same(self._held, value)
        if self._few:
            return len(value) <= MOST_ITEMS
        return self._code is None or bool(value.__code__ == self._code)

    def look(self, value: Any, changed: list[str]) -> None:
        """Appends the names of what differs from the last look, which this one replaces."""
        keys, values = self._read(value)
        ids = [*map(id, values)]
        if keys is not self._keys:
            ids += map(id, keys)
        if (
            ids != self._ids
            or [1 for weak in self._weak if weak() is None]  # its address may be another's now
            or [1 for index, inner in self._inner if not inner.takes(values[index])]
        ):
            again: Reader | None = getattr(self._read, "again", None)
            keys, values = again(value) if again else (keys, values)
            self._update(keys, values, changed)
        stamps = [_tensor_stamp(values[index]) for index in self._tensors]
        if stamps != self._stamps:
            pairs = zip(self._tensors, self._stamps, stamps, strict=True)
            changed += [self._label(self._keys[i]) for i, old, new in pairs if old != new]
            self._stamps = stamps
        for index, inner in self._inner:
            inner.look(values[index], changed)

    def _update(self, keys: Sequence[Any], values: list[Any], changed: list[str]) -> None:
        """Takes over other values; what can still be looked into is kept, for after this."""
        inside, stamps = dict(self._inner), dict(zip(self._tensors, self._stamps, strict=True))
        before = {key: (self._kept[index], index) for index, key in enumerate(self._keys)}
        self._kept, self._inner, self._tensors, self._stamps = [], [], [], []
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            held, at = before.pop(key, _NEW)
            inner, stamp = (None, None) if at is None else (inside.get(at), stamps.get(at))
            if not (inner.takes(value) if inner is not None else _same(held, value)):
                name = self._label(key)
                changed.append(name)
                inner = self._plan.watch(name, value, self._level + 1)
                stamp = _tensor_stamp(value) if self._plan.counts_writes(value) else None
            if inner is not None:
                self._inner.append((index, inner))
            if stamp is not None:
                self._tensors.append(index)
                self._stamps.append(stamp)
            self._kept.append(_hold(value) if inner is None else None)
        changed += map(self._label, before)
        self._keys, self._ids = keys, [*map(id, values)]
        if not isinstance(keys, tuple):
            self._ids += map(id, keys)
        self._weak = [held for held in self._kept if type(held) is _Weak]


def _tensor_stamp(tensor: Tensor) -> tuple[int, bool]:
    return tensor._version, tensor.requires_grad
