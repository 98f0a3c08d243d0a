"""Drive the base optimizer over drifts, in place, and put everything back: the paper's ``h``.

The base is stepped as it is, with its own code (law "any optimizer"). What a step may change besides the
parameters - its state, group values, attributes, nested optimizers, generators, the LR scheduler - is
captured by `Snapshot` before a rollout and restored after it.
"""

from __future__ import annotations

import random
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from picardopt.drift import Drift, Outcome, set_gradients
from picardopt.layout import Row
from picardopt.rng import preserved_rng

_LEAVES = (
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


class Snapshot:
    """Everything mutable that is reachable from some objects, to be put back in place.

    Tensors keep their identity and storage; containers keep their identity. Backup tensors are reused
    from one capture to the next.

    Args:
        roots: Objects to walk (the base optimizer, the LR scheduler).
        leave: Objects that are not entered (the wrapper itself).
    """

    def __init__(self, roots: Sequence[object], leave: Sequence[object] = ()) -> None:
        self._roots = list(roots)
        self._leave = {id(obj) for obj in leave}
        self._tensors: list[Tensor] = []
        self._backups: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []

    def capture(self, parameters: Sequence[Tensor]) -> None:
        """Records the present state; `parameters` are the caller's to restore.

        Args:
            parameters: Tensors that are not captured although they are reachable.
        """
        self._tensors, self._undo = [], []
        seen = self._leave | {id(p) for p in parameters}
        for root in self._roots:
            self._visit(root, seen)
        reusable = len(self._backups) == len(self._tensors) and all(
            b.shape == t.shape and b.dtype == t.dtype and b.device == t.device
            for b, t in zip(self._backups, self._tensors, strict=True)
        )
        if not reusable:
            self._backups = [torch.empty_like(t) for t in self._tensors]
        if self._tensors:
            with torch.no_grad():
                torch._foreach_copy_(self._backups, self._tensors)

    def restore(self) -> None:
        """Puts the captured state back; may be called again."""
        with torch.no_grad():
            for tensor, backup in zip(self._tensors, self._backups, strict=True):
                if tensor.shape != backup.shape:
                    tensor.resize_(backup.shape)
            if self._tensors:
                torch._foreach_copy_(self._tensors, self._backups)
        for undo in self._undo:
            undo()

    def _visit(self, obj: Any, seen: set[int]) -> None:
        if isinstance(obj, _LEAVES) or id(obj) in seen:
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
            self._tensors.append(_written_once(tensor))
        else:  # a subclass made of other tensors (quantised states); it may not even know how to be copied
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

    def _keep_dict(self, obj: dict[Any, Any]) -> None:
        items = list(obj.items())

        def undo() -> None:
            now = obj.items()
            if len(now) != len(items) or any(
                k is not key or v is not value
                for (k, v), (key, value) in zip(now, items, strict=True)
            ):
                obj.clear()
                obj.update(items)

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


class Rollout:
    """Rolls a base optimizer out over drifts from the head and leaves no trace.

    Args:
        base: The wrapped optimizer.
        owner: The wrapper; the snapshot does not enter it.
    """

    def __init__(self, base: Optimizer, owner: object) -> None:
        self.base = base
        self.lr_scheduler: LRScheduler | None = None
        self._owner = owner
        self._snapshot = Snapshot([base])
        self._before = Snapshot([base])

    def watch(self, lr_scheduler: LRScheduler | None) -> None:
        """Sets the scheduler that tells future learning rates; None takes them as constant."""
        self.lr_scheduler = lr_scheduler
        self._snapshot = Snapshot([self.base, lr_scheduler], leave=[self._owner])

    @contextmanager
    def speculation(self, parameters: Sequence[Tensor], head: Row) -> Iterator[None]:
        """Within it the base may be stepped; afterwards parameters, state and generators are the head's.

        Args:
            parameters: The live parameters and then the carry, holding the head's values.
            head: The head's row.
        """
        grads = [p.grad for p in parameters]
        with preserved_rng(), hooks_held_back(self.base, own=True):
            self._snapshot.capture(parameters)
            try:
                yield
            finally:
                self.rewind(parameters, head)
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad

    def rewind(self, parameters: Sequence[Tensor], head: Row) -> None:
        """Goes back to the head, to roll out again. Only inside `speculation`."""
        self._snapshot.restore()
        head.load(parameters)

    def advance(self, parameters: Sequence[Tensor], drift: Drift) -> None:
        """One speculative step: base, then the scheduler. Only inside `speculation`."""
        self.apply(parameters, drift)
        self._advance_scheduler()

    def apply(self, parameters: Sequence[Tensor], drift: Drift) -> None:
        """Steps the base over one drift, with the generators as that drift's closure left them.

        One that is not finite leaves the base untouched (``nonfinite="skip"``).
        """
        set_gradients(parameters, drift)
        if drift.rng is not None:
            drift.rng.restore()
        if drift.outcome is Outcome.FINITE:
            self.base.step()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Within it a step is taken for real; the base's own hooks fire, the global ones are the wrapper's."""
        with preserved_rng(), hooks_held_back(self.base, own=False):
            yield

    def take(self, parameters: Sequence[Tensor], drift: Drift) -> None:
        """One step for real. Only inside `committing`; a hook that raises undoes it."""
        hooked = any(_own_hooks(self.base))
        if hooked:  # only then: it costs a copy of the state
            self._before.capture([])
        try:
            self.apply(parameters, drift)
        except BaseException:
            if hooked:
                self._before.restore()
            raise

    def plain_step(self) -> None:
        """Steps the base on the present gradients, with the caller's generators."""
        with hooks_held_back(self.base, own=False):
            self.base.step()

    def _advance_scheduler(self) -> None:
        scheduler = self.lr_scheduler
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return
        try:
            # The class's own step: wrappers of the instance's belong to the user's loop.
            type(scheduler).step(scheduler)
        except ValueError:
            # OneCycleLR past its end: the last values hold.
            return


@contextmanager
def hooks_held_back(base: Optimizer, *, own: bool) -> Iterator[None]:
    """Empties torch's global step hooks, and with `own` the base's too, for a while."""
    registries: list[OrderedDict[Any, Any] | dict[Any, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    registries += _own_hooks(base) if own else []
    saved = [list(registry.items()) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, items in zip(registries, saved, strict=True):
            registry.clear()
            registry.update(items)


def _own_hooks(base: Optimizer) -> list[OrderedDict[Any, Any]]:
    """The step hooks' registries of an optimizer and of those that it drives."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    # Not every subclass calls Optimizer.__init__.
    return [
        getattr(optimizer, name)
        for optimizer in _with_nested(base)
        for name in names
        if hasattr(optimizer, name)
    ]


def _with_nested(base: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it drives (a joined list, Lookahead's inner one)."""
    found = [base]
    for value in vars(base).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Optimizer):
                found += _with_nested(item)
    return found


def _written_once(tensor: Tensor) -> Tensor:
    """The tensor itself; of an expanded one, a view of one copy of what is repeated."""
    repeated = [
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ]
    if not any(repeated):
        return tensor
    return tensor.detach()[tuple(slice(0, 1) if again else slice(None) for again in repeated)]


def _discard(_: object) -> None:
    return None
