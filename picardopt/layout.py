"""Lists of parameters in one flat buffer, the form of iterates, drifts and messages.

The live parameters keep their shapes, which optimizers read; residuals, bit comparisons and messages use one
contiguous buffer. A `Row` is that buffer, with views as bytes, per dtype and per parameter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import Optimizer

from picardopt.memory import allocation

_BLOCK = 1 << 16  # elements
_LARGE = 1 << 14
"""Elements of a tensor from which it is better compared by itself than copied into a row with the others."""
_ALIGNMENT = 16  # bytes; the largest element (complex128) may start at any segment


@dataclass(frozen=True)
class Row:
    """One value for every parameter, and for every tensor of the carry, in one buffer.

    A drift's row holds gradients in place of the parameters, and the carry as it is after the closure.

    Attributes:
        buffer: uint8 tensor [row_bytes]; padding is always zero.
        segments: flat tensors over the parameters, one dtype each (complex seen as real), views of `buffer`.
        groups: the tensors that count in residuals, flat, by parameter group, views of `buffer`.
        tensors: one tensor per parameter, shaped like it, views of `buffer`.
        carry: one tensor per tensor of the carry, shaped like it, views of `buffer`.
    """

    buffer: Tensor
    segments: list[Tensor]
    groups: list[list[Tensor]]
    tensors: list[Tensor]
    carry: list[Tensor]

    def copy_(self, other: Row) -> None:
        """Copies another row's bits."""
        self.buffer.copy_(other.buffer)

    def fingerprint(self) -> int:
        """Returns a 63-bit sum of the bits, to compare ranks (one host sync)."""
        return int(self.buffer.view(torch.int64).sum()) & (2**63 - 1)

    def finite(self) -> Tensor:
        """Returns whether no parameter's element is NaN or infinite, as a bool scalar tensor (no host sync)."""
        # The least and the largest element are NaN if any is: one pass, where `isfinite` takes several.
        ends = [torch.stack(torch.aminmax(flat)) for flat in self._numbers if flat.numel()]
        return torch.stack([torch.isfinite(pair).all() for pair in ends]).all()

    def is_finite(self) -> bool:
        """Returns whether no parameter's element is NaN or infinite (one host sync)."""
        if not self.buffer.is_cpu:
            return bool(self.finite())
        # A sum of squares is finite only if all elements are; one that is not may have overflowed.
        sums = [float(torch.dot(flat, flat)) for flat in self._numbers]
        return all(map(math.isfinite, sums)) or bool(self.finite())

    @property
    def _numbers(self) -> list[Tensor]:
        """The segments that can hold a NaN: not those of frozen parameters of integers or flags."""
        return [flat for flat in self.segments if flat.is_floating_point()]

    @torch.no_grad()
    def store(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors (the parameters, then the carry) into this row."""
        torch._foreach_copy_([*self.tensors, *self.carry], list(tensors))

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copies this row into tensors (the parameters, then the carry), in place."""
        torch._foreach_copy_(list(tensors), [*self.tensors, *self.carry])


class ParameterLayout:
    """The positions of the parameters, and of the carry's tensors, in a row.

    Args:
        parameters: The parameters, in the order of the optimizer's groups.
        carry: Tensors besides parameters that a step reads and rewrites.
        unmeasured: Parameters that do not count in residuals.
        sizes: Number of parameters of each group; one group by default.

    Attributes:
        numels: Number of measured elements of each group that has any.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        carry: Sequence[Tensor] = (),
        unmeasured: Sequence[Tensor] = (),
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.parameters, self.carry = list(parameters), list(carry)
        self.tensors = [*parameters, *carry]
        self.device = self.parameters[0].device
        self._kinds = [_kind(tensor) for tensor in self.tensors]
        self._offsets = [0] * len(self.tensors)
        left_out = {id(p) for p in unmeasured}
        # Integers and flags are frozen: torch gives them no gradients.
        left_out |= {id(p) for p in parameters if not (p.is_floating_point() or p.is_complex())}
        counted = [i for i, p in enumerate(self.parameters) if id(p) not in left_out]
        rest = [i for i, p in enumerate(self.parameters) if id(p) in left_out]
        end, spans = self._place(0, counted)
        self._group_spans = self._spans_by_group(counted, sizes or [len(self.parameters)])
        self.numels = [sum(self._numel(span) for span in each) for each in self._group_spans]
        self._members = self._members_by_group(counted, sizes or [len(self.parameters)])
        end, more = self._place(end, rest)
        self._parameter_spans = spans + more
        end, _ = self._place(end, range(len(self.parameters), len(self.tensors)))
        self.row_bytes = _aligned(end)

    def _place(
        self, end: int, indices: Sequence[int]
    ) -> tuple[int, list[tuple[torch.dtype, int, int]]]:
        """Gives tensors their offsets, dtype by dtype, from `end` on; returns the new end and the dtypes' spans."""
        spans = []
        for dtype in dict.fromkeys(self.tensors[index].dtype for index in indices):
            start = end = _aligned(end)
            for tensor, index in ((self.tensors[index], index) for index in indices):
                if tensor.dtype == dtype:
                    self._offsets[index] = end
                    end += tensor.numel() * tensor.element_size()
            spans.append((dtype, start, end))
        return end, spans

    def _spans_by_group(
        self, counted: Sequence[int], sizes: Sequence[int]
    ) -> list[list[tuple[torch.dtype, int, int]]]:
        """Returns the dtypes' spans of every group with a measured element: tensors of a group are neighbours."""
        group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
        spans: dict[int, dict[torch.dtype, tuple[int, int]]] = {}
        for index in counted:
            tensor, at = self.parameters[index], self._offsets[index]
            if tensor.numel():
                own = spans.setdefault(group_of[index], {})
                first, _ = own.get(tensor.dtype, (at, at))
                own[tensor.dtype] = first, at + tensor.numel() * tensor.element_size()
        return [[(dtype, *span) for dtype, span in own.items()] for own in spans.values()] or [[]]

    def _members_by_group(
        self, counted: Sequence[int], sizes: Sequence[int]
    ) -> list[list[int]] | None:
        """Returns the measured parameters of every group that has any; None if they are better copied than compared."""
        group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
        members: dict[int, list[int]] = {}
        for index in counted:
            p = self.parameters[index]
            if not (p.is_cpu and p.is_contiguous()) or p.is_complex():
                return None
            if p.numel():
                members.setdefault(group_of[index], []).append(index)
        large = sum(self.numels) >= _LARGE * len(counted)
        return list(members.values()) if large else None

    @staticmethod
    def _numel(span: tuple[torch.dtype, int, int]) -> int:
        dtype, start, end = span
        return (end - start) // dtype.itemsize

    @property
    def shapes(self) -> list[torch.Size]:
        """The tensors' shapes when the layout was made: the parameters', then the carry's."""
        return [kind[0] for kind in self._kinds]

    @property
    def measured_bytes(self) -> int:
        """Bytes of the measured parameters, in float32 or finer."""
        spans = [span for own in self._group_spans for span in own]
        wide = torch.float32
        return sum(self._numel(s) * torch.promote_types(s[0], wide).itemsize for s in spans)

    @cached_property
    def digest(self) -> int:
        """A 63-bit hash of shapes, dtypes and positions, equal on ranks that hold the same tensors."""
        kinds = [(tuple(shape), str(dtype)) for shape, dtype, *_ in self._kinds]
        text = repr((kinds, self._offsets, self.numels))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def describes(self, parameters: Sequence[Tensor], carry: Sequence[Tensor] = ()) -> bool:
        """Returns whether these are the same tensors, with their shapes, dtypes, devices and `requires_grad`."""
        tensors = [*parameters, *carry]
        return len(tensors) == len(self.tensors) and all(
            p is q and _kind(p) == kind
            for p, q, kind in zip(tensors, self.tensors, self._kinds, strict=True)
        )

    def beside(self, row: Row) -> list[tuple[list[Tensor], list[Tensor]]] | None:
        """Returns the live measured parameters and a row's, flat, tensor by tensor in every group.

        None where it is cheaper to copy the live tensors into a row.
        """
        if self._members is None:
            return None
        return [
            (
                [self.parameters[index].detach().reshape(-1) for index in group],
                [row.tensors[index].view(-1) for index in group],
            )
            for group in self._members
        ]

    def row(self, buffer: Tensor | None = None) -> Row:
        """Returns a new row, on a given uint8 buffer [row_bytes] or a new zeroed one."""
        if buffer is None:
            with allocation("one iterate or drift", self.row_bytes, self.device):
                buffer = torch.zeros(self.row_bytes, dtype=torch.uint8, device=self.device)
        segments = [_flat(buffer, *span) for span in self._parameter_spans]
        groups = [[_flat(buffer, *span) for span in spans] for spans in self._group_spans]
        views = [
            buffer[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
            for at, t in zip(self._offsets, self.tensors, strict=True)
        ]
        count = len(self.parameters)
        return Row(buffer, segments, groups, views[:count], views[count:])

    def zeros(self) -> Row:
        """Returns a row of zeros to read, without memory of its own: no buffer, segments or groups."""
        views = [t.new_zeros(()).expand(t.shape) for t in self.tensors]
        count = len(self.parameters)
        return Row(torch.empty(0), [], [], views[:count], views[count:])


def blocks(like: Tensor) -> Iterator[slice]:
    """Yields the parts of a flat tensor that are worked on at once: what a CPU's cache holds, elsewhere all of it."""
    length = _BLOCK if like.is_cpu else max(1, like.numel())
    for start in range(0, like.numel(), length):
        yield slice(start, min(start + length, like.numel()))


def _flat(buffer: Tensor, dtype: torch.dtype, start: int, end: int) -> Tensor:
    """Returns a span of a row as a flat tensor, complex numbers seen as real."""
    flat = buffer[start:end].view(dtype)
    return torch.view_as_real(flat).flatten() if dtype.is_complex else flat


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns the optimizer's present parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    return parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad
