"""Finds buffers and parameters that a closure changes although they were not declared as carry."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from picardopt.errors import ImpureClosureError
from picardopt.layout import ParameterLayout, Row


class BufferGuard:
    """Context around a closure: raises if it changed a module's buffer or a parameter, and undoes the change.

    Modules are found when they are called; those known from earlier calls are watched from the start. Of modules that
    the closure sees and does not call (an average of weights), writes to their tensors are noticed, but not undone.

    Args:
        modules: Modules known so far; new ones are added.
        layout: The optimizer's parameters and the carry.
        guess: Their values.
        rewritten: Tensors that may change: the carry, unless it has an update of its own.
        seen: What the closure can see.
        find: Whether to watch modules that are called for the first time too.
    """

    def __init__(
        self,
        modules: weakref.WeakSet[torch.nn.Module],
        layout: ParameterLayout,
        guess: Row,
        rewritten: Sequence[Tensor],
        seen: Iterable[object],
        find: bool,
    ) -> None:
        self._known, self._find = modules, find
        self._layout, self._guess = layout, guess
        self._declared = {id(tensor) for tensor in layout.carry}
        self._rewritten = {id(tensor) for tensor in rewritten}
        self._aside = list(_tensors_of(seen))
        self._seen: set[int] = set()
        self._kept: list[tuple[str, Tensor, Tensor]] = []

    def __enter__(self) -> None:
        values = zip(self._layout.parameters, self._guess.tensors, strict=True)
        for index, (parameter, before) in enumerate(values):
            name = f"parameter {index} of shape {tuple(parameter.shape)}"
            self._kept.append((name, parameter.detach(), before))
        carried = zip(self._layout.carry, self._guess.carry, strict=True)
        for index, (tensor, before) in enumerate(carried):
            if id(tensor) not in self._rewritten:
                name = f"carry[{index}], which only its update may rewrite"
                self._kept.append((name, tensor, before))
        for module in list(self._known):
            self._visit(module)
        self._handle = register_module_forward_pre_hook(self._on_call) if self._find else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        changed = []
        for name, tensor, before in self._kept:
            # A NaN that stays NaN is no change.
            if bool(((tensor != before) & ((tensor == tensor) | (before == before))).any()):
                changed.append(name)
                with torch.no_grad():
                    tensor.copy_(before)
        known = {*self._declared, *map(id, self._layout.parameters)}
        for name, module, tensor, version in self._aside:
            if tensor._version != version and id(tensor) not in known and module not in self._known:
                changed.append(name)
        if changed and error is None:
            raise ImpureClosureError(
                f"the closure changed {', '.join(changed)}: evaluated ahead of time, and more than once per step, "
                "it would leave values there that belong to no step. Declare such tensors with carry= (a module's "
                "buffers, or a list), use eval mode, or update them after step()"
            )

    def _on_call(self, module: torch.nn.Module, args: Any) -> None:
        if id(module) not in self._seen:
            self._known.add(module)
            self._visit(module)

    def _visit(self, module: torch.nn.Module) -> None:
        for name, child in module.named_modules():
            if id(child) not in self._seen:
                self._seen.add(id(child))
                prefix = f"{type(module).__name__}.{name}" if name else type(module).__name__
                for key, buffer in child.named_buffers(recurse=False):
                    if id(buffer) not in self._declared:
                        self._kept.append((f"buffer {prefix}.{key}", buffer, buffer.clone()))


def _tensors_of(seen: Iterable[object]) -> Iterator[tuple[str, torch.nn.Module, Tensor, int]]:
    """Yields the tensors of the modules among some objects: names, modules, and how often they were written to."""
    modules: list[Any] = [each for each in seen if issubclass(type(each), torch.nn.Module)]
    found: set[int] = set()
    for module in modules:
        if "_modules" not in vars(module):  # its constructor has not run
            continue
        for name, child in module.named_modules(prefix=type(module).__name__):
            if id(child) not in found:
                found.add(id(child))
                own = [("buffer", child.named_buffers), ("parameter", child.named_parameters)]
                for kind, named in own:
                    for key, tensor in named(recurse=False):
                        if not (is_lazy(tensor) or tensor.is_inference()):
                            yield f"{kind} {name}.{key}", child, tensor, tensor._version
