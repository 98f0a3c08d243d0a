"""Is the closure a function of (parameters, step)? Running ahead is only right if it is.

The commonest misuse is ``batch = next(it)`` before ``step(closure)``: the whole window then silently sees
one batch. It shows when a drift that was evaluated ahead is evaluated again, later, with the closure of
its own call; and buffers that a closure changes show at once.
"""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from picardopt.drift import Drift
from picardopt.errors import ImpureClosureError
from picardopt.layout import ParameterLayout
from picardopt.modules import live_modules, uses_compile
from picardopt.sweep import same_bits, squared_difference

MODES = ("auto", "always", "never")
REMEDY = (
    "Make step t's work a function of the parameters and t alone:\n"
    "  1. take the data inside the closure, by step: `def closure(step): batch = loader.batch(step)` "
    "(StepIndexedLoader);\n"
    "  2. draw randomness only from torch's, numpy's or random's global generators, inside the closure;\n"
    '  3. keep counters, iterators and buffers out of it. (`audit="never"` switches this check off.)'
)
_FIRST_SWEEPS = 3
_LONGEST_GAP = 1000  # sweeps
_ROUNDING = 1e-11  # relative squared difference that any reordered float32 sum may make
_LARGEST_NOISE = {"cpu": 1e-3}  # of the drift's norm: more than that is no rounding
_LARGEST_NOISE_ELSEWHERE = 0.05


class Audit:
    """When to check, and what counts as different.

    Args:
        mode: "auto" (the first sweeps, then ever more rarely), "always" (every sweep) or "never".

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"audit={mode!r}: give one of {', '.join(map(repr, MODES))}")
        self.mode = mode
        # By whether the drift was evaluated ahead, beyond its sweep's head. The head's own check, all there is while
        # strides are 1, sees little: it must not use up the checks of the others.
        self._done = {False: 0, True: 0}
        self._next = {False: 0, True: 0}
        self._searched = False
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Modules that were seen are weak references: they do not travel and are found again.
        kept = {key: value for key, value in vars(self).items() if key != "_modules"}
        return {**kept, "_searched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _modules=weakref.WeakSet())

    def due(self, sweep: int, *, ahead: bool) -> bool:
        """Whether a drift of this sweep is to be evaluated again: the head's, or one beyond it."""
        return self.mode == "always" or (self.mode == "auto" and sweep >= self._next[ahead])

    def passed(self, sweep: int, *, ahead: bool) -> None:
        """Plans the next check after one that found nothing."""
        self._done[ahead] += 1
        following = sweep + 1 if self._done[ahead] < _FIRST_SWEEPS else 2 * sweep + 1
        self._next[ahead] = min(following, sweep + _LONGEST_GAP)

    def guard(self, layout: ParameterLayout, rewritten: Sequence[Tensor]) -> StateGuard:
        """Watches what one call of the closure leaves behind; `rewritten` may change."""
        compiles = uses_compile()
        if compiles and not self._searched:
            self._modules.update(live_modules())
            self._searched = True
        return StateGuard(self._modules, layout, rewritten, find=not compiles)


class StateGuard:
    """Context around a closure: raises if it changed a module's buffer or a parameter, and undoes it.

    Modules are found as they are called; those known from earlier calls are watched from the start.

    Args:
        modules: Modules known so far; grows.
        layout: The optimizer's parameters and the carry.
        rewritten: Tensors that may change: the carry, unless it has an update of its own.
        find: Whether modules that are called for the first time are watched too.
    """

    def __init__(
        self,
        modules: weakref.WeakSet[torch.nn.Module],
        layout: ParameterLayout,
        rewritten: Sequence[Tensor],
        find: bool,
    ) -> None:
        self._known, self._find = modules, find
        self._layout = layout
        self._declared = {id(tensor) for tensor in layout.carry}
        self._rewritten = {id(tensor) for tensor in rewritten}
        self._seen: set[int] = set()
        self._kept: list[tuple[str, Tensor, Tensor]] = []

    def __enter__(self) -> None:
        for index, parameter in enumerate(self._layout.parameters):
            self._keep(f"parameter {index} of shape {tuple(parameter.shape)}", parameter.detach())
        for index, tensor in enumerate(self._layout.carry):
            if id(tensor) not in self._rewritten:
                self._keep(f"carry[{index}], which its update is to rewrite", tensor)
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
            # NaN that stays NaN is no change.
            if bool(((tensor != before) & ((tensor == tensor) | (before == before))).any()):
                changed.append(name)
                with torch.no_grad():
                    tensor.copy_(before)
        if changed and error is None:
            raise ImpureClosureError(
                f"the closure changed {', '.join(changed)}: run ahead of time, and more than once a step, it "
                "would leave there what never happened. Declare such tensors with carry= (a module's buffers, or "
                "a list), use eval mode, or update them after step()"
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
                        self._keep(f"buffer {prefix}.{key}", buffer)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._kept.append((name, tensor, tensor.clone()))


def options_of(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the groups' options (lr, betas, ...), to be compared with later."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in groups
    ]


def refuse_changed_options(
    groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> None:
    """Raises, and undoes it, if a closure wrote to its optimizer's groups (a warm-up, a scheduler).

    Args:
        groups: The groups after the closure.
        before: Their `options_of` before it.

    Raises:
        ImpureClosureError: If an option has another value than before.
    """
    changed = set()
    for group, old in zip(groups, before, strict=False):
        for key, value in old.items():
            now = group.get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor):
                if not torch.equal(now, value):
                    changed.add(key)
                    now.copy_(value)
            elif now is not value and now != value:
                changed.add(key)
                group[key] = value
    if changed:
        raise ImpureClosureError(
            f"the closure set {', '.join(sorted(changed))} in the optimizer's groups: evaluated ahead of time, it "
            "would set a later step's value now. Set it after step(), or use an LR scheduler in your loop and tell "
            "it with lr_scheduler="
        )


def differs(queued: Drift, again: Drift, scratch: Tensor) -> float:
    """How far two evaluations of one drift lie apart.

    Returns:
        Squared distance over the queued drift's squared norm; 0 only for equal bits, infinity if one has
        gradients (or an outcome) that the other has not.
    """
    if queued.outcome is not again.outcome or queued.present != again.present:
        return float("inf")
    if bool(same_bits(queued.row, again.row)):
        return 0.0
    distance = float(squared_difference(queued.row.segments, again.row.segments, scratch))
    norm = sum(
        float(torch.linalg.vector_norm(s, dtype=torch.float64)) ** 2 for s in queued.row.segments
    )
    return max(distance / norm, torch.finfo(torch.float64).tiny) if norm > 0 else float("inf")


def is_noise(difference: float, noise: float, device: torch.device, data_size: int) -> bool:
    """Whether a difference is explained by what two equal evaluations differ by anyway.

    One CPU thread adds in one order, and a sum over two ranks has only one: nothing is noise there. Over more,
    DistributedDataParallel changes the order after its first backward, when it rebuilds its buckets.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1 and data_size <= 2:
        return False
    largest = _LARGEST_NOISE.get(device.type, _LARGEST_NOISE_ELSEWHERE)
    return difference <= max(16 * noise, _ROUNDING) and noise <= largest**2


def float_bits(value: float) -> int:
    """A float's bits as a signed integer, to be sent among integers."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def bits_float(bits: int) -> float:
    """The float that `float_bits` packed."""
    value: float = struct.unpack("<d", bits.to_bytes(8, "little", signed=True))[0]
    return value


def impure(step: int, differences: Sequence[float]) -> ImpureClosureError:
    """The error for a closure that did not give its own drift again.

    Args:
        step: The step.
        differences: Relative squared difference by rank; infinite where it raised or lacked gradients.
    """
    ranks = [rank for rank, difference in enumerate(differences) if difference]
    where = f" on rank {', '.join(map(str, ranks))}" if len(differences) > 1 else ""
    worst = max(differences)
    how = (
        "raised, or had gradients for other parameters"
        if math.isinf(worst)
        else (f"gave another gradient (relative squared difference {worst:.3g})")
    )
    return ImpureClosureError(
        f"the closure is not a function of (parameters, step): evaluated again at the same parameters for step "
        f"{step}, it {how}{where}. {REMEDY}"
    )
