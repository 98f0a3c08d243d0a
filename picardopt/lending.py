"""Lends drifts as gradients to steps ahead: without a copy, to optimizers that only read them.

Those are torch's own, by their exact class. All others get copies, because they may write to a gradient or keep it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from picardopt.bases import JoinedOptimizer
from picardopt.compat import counted_step
from picardopt.drift import Drift, set_gradients
from picardopt.layout import ParameterLayout

READERS = (Adam, AdamW, SGD, Adagrad, RMSprop, Adamax, Adadelta)
"""Torch's optimizers that neither write nor keep gradients, and draw no random numbers."""
_WRITING = ("nesterov", "capturable", "differentiable")
"""Options with which this does not hold, or is not tested."""


class Lending:
    """Sets the gradients of steps ahead.

    Args:
        base: The wrapped optimizer.
        layout: Its parameters.
    """

    def __init__(self, base: Optimizer, layout: ParameterLayout) -> None:
        self._members = base.optimizers if isinstance(base, JoinedOptimizer) else [base]
        self._layout, self._zeros = layout, list[Tensor]()
        plain = all(_is_plain(parameter) for parameter in layout.parameters)
        self._known = plain and all(type(member) in READERS for member in self._members)

    @property
    def only_reads(self) -> bool:
        """Whether the base does no more to gradients than to read them, and draws nothing."""
        return self._known and not any(
            _is_patched(member) or any(group.get(name) for name in _WRITING)
            for member in self._members
            for group in member.param_groups
        )

    def set_gradients(self, drift: Drift) -> None:
        """Sets the parameters' gradients for a step ahead: the drift's row itself, or a copy."""
        if drift.strides or not self.only_reads:
            set_gradients(self._layout.parameters, drift)
            return
        # A row of zeros has no segments, and its tensors repeat one element, which torch's implementations cannot read.
        rows = drift.row.tensors if drift.row.segments else self._zero_gradients()
        for parameter, row, present in zip(
            self._layout.parameters, rows, drift.present, strict=True
        ):
            parameter.grad = row if present else None

    def _zero_gradients(self) -> Sequence[Tensor]:
        """Returns gradients of zeros, which share the memory of the largest one."""
        if not self._zeros:
            largest: dict[torch.dtype, Tensor] = {}
            for p in sorted(self._layout.parameters, key=Tensor.numel, reverse=True):
                largest.setdefault(p.dtype, p.new_zeros(p.numel()))
            self._zeros = [
                largest[p.dtype][: p.numel()].view(p.shape) for p in self._layout.parameters
            ]
        return self._zeros


def _is_plain(parameter: Tensor) -> bool:
    """Returns whether a row's view can be the gradient of a parameter."""
    real = parameter.is_floating_point() and parameter.layout is torch.strided
    return real and parameter.is_contiguous() and type(parameter) in (Tensor, torch.nn.Parameter)


def _is_patched(member: Optimizer) -> bool:
    """Returns whether a step of somebody's own was put in place of the class's; a scheduler's counts the calls only."""
    step = vars(member).get("step")
    if step is None:
        return False
    counts = getattr(step, "_wrapped_by_lr_sched", False)
    return not (counts and counted_step(step) is type(member).step)
