"""Captures all mutable state that some objects reach, and restores it in place."""

from __future__ import annotations

import random
import threading
import types
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.memory import allocation

LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    torch.dtype,
    torch.device,
    dist.ProcessGroup if dist.is_available() else type(None),
    threading.Thread,
)
"""What holds no state, or none that is captured."""


class Snapshot:
    """The mutable state reachable from some objects, which can be restored in place.

    Tensors keep their identity and storage; containers keep their identity. Backup tensors are reused
    from one capture to the next.

    Args:
        roots: Objects to walk (the base optimizer, the LR scheduler).
        skip: Objects not to walk (the wrapper itself); only their ids are kept.
    """

    def __init__(self, roots: Sequence[object], skip: Sequence[object] = ()) -> None:
        self._roots = list(roots)
        self._skip = {id(obj) for obj in skip}
        self._tensors: list[Tensor] = []
        self._backups: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []

    def capture(
        self,
        skip: Sequence[Tensor] = (),
        *,
        extra: Sequence[object] = (),
        holders: Sequence[object] = (),
    ) -> None:
        """Records the present state.

        Args:
            skip: Reachable tensors not to capture; the caller restores them.
            extra: More objects to walk this time (the carry).
            holders: Containers, and objects of which only the attributes and the containers among them are recorded
                (of modules also the parameter and buffer entries): the references to tensors, not their values.
        """
        self._tensors, self._undo = [], []
        seen = self._skip | {id(p) for p in skip}
        for root in (*self._roots, *extra):
            self._visit(root, seen)
        for holder in holders:
            self._keep_attributes(holder)
        reusable = len(self._backups) == len(self._tensors) and all(
            b.shape == t.shape and b.dtype == t.dtype and b.device == t.device
            for b, t in zip(self._backups, self._tensors, strict=True)
        )
        if not reusable:
            self._backups = []
        if self._tensors:
            if not reusable:
                count = sum(tensor.nbytes for tensor in self._tensors)
                with allocation("the optimizer's state", count, self._tensors[0].device):
                    self._backups = [torch.empty_like(t) for t in self._tensors]
            with torch.no_grad():
                torch._foreach_copy_(self._backups, self._tensors)

    def restore(self) -> None:
        """Restores the captured state; may be called again."""
        with torch.no_grad():
            for tensor, backup in zip(self._tensors, self._backups, strict=True):
                if tensor.shape == backup.shape:
                    continue
                if (
                    tensor.requires_grad
                ):  # changed by an assignment to .data; torch cannot resize such tensors
                    tensor.data = torch.empty_like(backup)
                else:
                    tensor.resize_(backup.shape)
            if self._tensors:
                torch._foreach_copy_(self._tensors, self._backups)
        for undo in self._undo:
            undo()

    def release(self, *, backups: bool) -> None:
        """Frees the captured references, and with `backups` the memory that later captures would reuse."""
        self._tensors, self._undo = [], []
        if backups:
            self._backups = []

    def _visit(self, obj: Any, seen: set[int]) -> None:
        if isinstance(obj, LEAVES) or id(obj) in seen:
            return
        seen.add(id(obj))
        if isinstance(obj, Tensor):
            self._keep_tensor(obj, seen)
        elif isinstance(obj, dict):
            self._keep_dict(obj)
            for value in obj.values():
                self._visit(value, seen)
        elif isinstance(obj, list | deque):
            self._keep_sequence(obj)
            for value in obj:
                self._visit(value, seen)
        elif isinstance(obj, tuple | frozenset):
            for value in obj:
                self._visit(value, seen)
        elif isinstance(obj, set):
            self._keep_set(obj)
        else:
            self._keep_object(obj, seen)

    def _keep_tensor(self, tensor: Tensor, seen: set[int]) -> None:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None:
            self._tensors.append(_without_repetitions(tensor))
        else:  # a subclass made of other tensors (quantized states), which may not support copying
            self._visit(vars(tensor), seen)
            for name in flatten()[0]:
                self._visit(getattr(tensor, name), seen)

    def _keep_object(self, obj: Any, seen: set[int]) -> None:
        if isinstance(obj, torch.Generator):
            state = obj.get_state()
            self._undo.append(lambda: _discard(obj.set_state(state)))
        elif isinstance(obj, np.ndarray):
            array = obj.copy()
            self._undo.append(lambda: np.copyto(obj, array))
        elif isinstance(obj, np.random.Generator):
            bits = obj.bit_generator.state
            self._undo.append(lambda: setattr(obj.bit_generator, "state", bits))
        elif isinstance(obj, np.random.RandomState):
            legacy = obj.get_state(legacy=False)
            self._undo.append(lambda: obj.set_state(legacy))
        elif isinstance(obj, random.Random):
            stream = obj.getstate()
            self._undo.append(lambda: obj.setstate(stream))
        else:
            if hasattr(obj, "__dict__"):
                self._visit(vars(obj), seen)
            self._keep_slots(obj, seen)

    def _keep_slots(self, obj: Any, seen: set[int]) -> None:
        for cls in type(obj).__mro__:
            names = cls.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                    value = getattr(obj, name)
                    self._undo.append(partial(setattr, obj, name, value))
                    self._visit(value, seen)

    def _keep_attributes(self, holder: object) -> None:
        self._keep_container(holder)
        for each in holder.modules() if isinstance(holder, torch.nn.Module) else [holder]:
            if hasattr(each, "__dict__") and not isinstance(each, LEAVES):
                self._keep_dict(vars(each))
                for value in vars(each).values():
                    self._keep_container(value)

    def _keep_container(self, obj: object) -> None:
        if isinstance(obj, dict):
            self._keep_dict(obj)
        elif isinstance(obj, list):
            self._keep_sequence(obj)

    def _keep_dict(self, obj: dict[Any, Any]) -> None:
        items = list(obj.items())

        def undo() -> None:
            now = obj.items()
            if len(now) != len(items) or any(
                k is not key or v is not value
                for (k, v), (key, value) in zip(now, items, strict=True)
            ):
                obj.clear()
                for key, value in items:  # a Counter's update would count the pairs
                    obj[key] = value

        self._undo.append(undo)

    def _keep_sequence(self, obj: list[Any] | deque[Any]) -> None:
        items = list(obj)

        def undo() -> None:
            if len(obj) != len(items) or any(a is not b for a, b in zip(obj, items, strict=True)):
                obj.clear()
                obj.extend(items)

        self._undo.append(undo)

    def _keep_set(self, obj: set[Any]) -> None:
        items = set(obj)

        def undo() -> None:
            obj.clear()
            obj.update(items)

        self._undo.append(undo)


def _without_repetitions(tensor: Tensor) -> Tensor:
    """Returns the tensor itself; of an expanded tensor, a view without the repetitions."""
    if 0 not in tensor.stride():
        return tensor
    repeated = [
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ]
    if not any(repeated):
        return tensor
    return tensor.detach()[tuple(slice(0, 1) if again else slice(None) for again in repeated)]


def _discard(_: object) -> None:
    return None
