"""Steps torch's own optimizers ahead of time in torch's faster implementations of them.

What is ahead is a guess: only the base's own step, with its own options, commits. A guess may therefore be made by
``fused=True``, which rounds otherwise and takes a third to a sixth of the time on a CPU; at tolerance 0, where a guess
has to have the very bits, by ``foreach=True``, which gives them and helps where tensors are small. Optimizers that
are not torch's, and options that were chosen by hand, are left as they are. If guesses do not come true all the same,
the base's own step makes them from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from picardopt.bases import JoinedOptimizer
from picardopt.drift import Drift, set_gradients
from picardopt.layout import ParameterLayout, Row

FUSED = (Adam, AdamW, SGD, Adagrad)
"""Torch's optimizers that have ``fused`` on a CPU."""
READERS = (*FUSED, RMSprop, Adamax, Adadelta)
"""Torch's optimizers that read gradients, neither write nor keep them, draw no random numbers, and give the same bits
with ``foreach`` as without."""
_UNKNOWN = ("nesterov", "capturable", "differentiable")
"""Options with which this does not hold, or is not tested."""
_SMALL = 2048
"""Elements of a tensor up to which ``foreach`` is faster on a CPU: larger ones are better done one by one, in cache."""
_ROUNDING = 64
"""How far from those that commit steps ahead may end, in rounding errors of the parameters."""
_WRONG = 2
"""Checks in a row that found them elsewhere before steps ahead are made by the base's own step."""


class Shortcuts:
    """What may be shortened in steps of a base ahead of time.

    Args:
        base: The wrapped optimizer.
        layout: Its parameters.
        exact: Whether guesses need the bits of the base's own step.
    """

    def __init__(self, base: Optimizer, layout: ParameterLayout, *, exact: bool) -> None:
        members = base.optimizers if isinstance(base, JoinedOptimizer) else [base]
        plain = all(_is_plain(parameter) for parameter in layout.parameters)
        self._members, self._exact = members, exact
        self._layout, self._zeros = layout, list[Tensor]()
        self._known = plain and all(type(member) in READERS for member in members)
        numels = [parameter.numel() for parameter in layout.parameters]
        self._small = sum(numels) <= _SMALL * len(numels)
        self._cpu = layout.device.type == "cpu"
        # In half precision `fused` rounds once where the base's own step rounds often: that may be as much as a step.
        self._wide = all(p.dtype in (torch.float32, torch.float64) for p in layout.parameters)
        self._options: list[tuple[dict[str, Any], str]] = []
        self._wrong, self._lends = 0, False

    @property
    def only_reads(self) -> bool:
        """Whether the base does no more to gradients than to read them, and draws nothing."""
        return self._known and not any(
            _is_patched(member) or any(group.get(name) for name in _UNKNOWN)
            for member in self._members
            for group in member.param_groups
        )

    def begin(self) -> None:
        """Looks at the groups' options; before the base steps ahead."""
        self._options, self._lends = [], self.only_reads and self._wrong < _WRONG
        if not (self._lends and self._cpu):
            return
        for member in self._members:
            for group in member.param_groups:
                option = self._option(member, group)
                if option:
                    self._options.append((group, option))

    def _option(self, member: Optimizer, group: dict[str, Any]) -> str | None:
        """Returns the option of a group that makes its steps faster; None if there is none or one was chosen."""
        chosen = any(group.get(name) is not None for name in ("fused", "foreach"))
        values = [*group.values(), *group.get("betas", ())]
        if chosen or any(isinstance(value, Tensor) for value in values):
            return None
        if type(member) in FUSED and self._wide and not self._exact:
            return "fused"
        return "foreach" if self._small else None

    def set_options(self) -> None:
        """Sets the groups' options, which the caller puts back with the rest of the base's state."""
        for group, option in self._options:
            group[option] = True

    def set_gradients(self, drift: Drift) -> None:
        """Sets the parameters' gradients for a step ahead."""
        if not self._lends:
            set_gradients(self._layout.parameters, drift)
            return
        # A row of zeros has no segments, and its tensors repeat one element, which torch's implementations cannot read.
        rows = drift.row.tensors if drift.row.segments else self._zero_gradients()
        for parameter, row, present in zip(
            self._layout.parameters, rows, drift.present, strict=True
        ):
            parameter.grad = row if present else None

    def _zero_gradients(self) -> Sequence[Tensor]:
        if not self._zeros:
            largest: dict[torch.dtype, Tensor] = {}
            for p in sorted(self._layout.parameters, key=Tensor.numel, reverse=True):
                largest.setdefault(p.dtype, p.new_zeros(p.numel()))
            self._zeros = [
                largest[p.dtype][: p.numel()].view(p.shape) for p in self._layout.parameters
            ]
        return self._zeros

    def give_up(self) -> bool:
        """Makes the steps ahead the base's own from now on, as after an error; returns whether they were not before."""
        taken, self._wrong = self._lends, _WRONG
        self.begin()
        return taken

    @torch.no_grad()
    def check(self, head: Row) -> None:
        """Compares the live parameters, after commits, with the iterate that steps ahead had led to."""
        if self._lends:
            near = _same if self._exact else _near
            self._wrong = 0 if near(self._layout.parameters, head.tensors) else self._wrong + 1


def _same(live: Sequence[Tensor], ahead: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, live, ahead))


def _near(live: Sequence[Tensor], ahead: Sequence[Tensor]) -> bool:
    """Returns whether two lists of tensors are the same to rounding, as a whole."""
    apart = math.hypot(*(float(torch.dist(p, q)) for p, q in zip(live, ahead, strict=True)))
    length = math.hypot(*(float(torch.linalg.vector_norm(p)) for p in live))
    return apart <= _ROUNDING * max(torch.finfo(p.dtype).eps for p in live) * length


def _is_plain(parameter: Tensor) -> bool:
    """Returns whether torch's faster implementations can do with a parameter, and with a row's view as its gradient."""
    real = parameter.is_floating_point() and parameter.layout is torch.strided
    return real and parameter.is_contiguous() and type(parameter) in (Tensor, torch.nn.Parameter)


def _is_patched(member: Optimizer) -> bool:
    """Returns whether a step of somebody's own was put in place of the class's; a scheduler's counts the calls only."""
    step = vars(member).get("step")
    if step is None:
        return False
    counts = getattr(step, "_wrapped_by_lr_sched", False)
    return not (counts and step.__wrapped__ is type(member).step)
