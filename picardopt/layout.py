"""A list of parameters as one flat buffer: what iterates, drifts and messages are made of.

Optimizers read shapes and norms, so nothing is flattened for *them*; but residuals, bit comparisons and
messages want one contiguous buffer. A `Row` is that buffer, seen as bytes, per dtype and per parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

_ALIGNMENT = 16  # bytes; the largest element (complex128) may start at any segment


@dataclass(frozen=True)
class Row:
    """One value for every parameter, in one buffer.

    Attributes:
        buffer: uint8 tensor [row_bytes]; padding is always zero.
        segments: one flat tensor per dtype (complex seen as real), views of `buffer`.
        tensors: one tensor per parameter, shaped like it, views of `buffer`.
    """

    buffer: Tensor
    segments: list[Tensor]
    tensors: list[Tensor]

    def copy_(self, other: Row) -> None:
        """Takes over another row's bits."""
        self.buffer.copy_(other.buffer)

    def fingerprint(self) -> int:
        """63-bit sum over the bits, to compare ranks with (one host sync)."""
        return int(self.buffer.view(torch.int64).sum()) & (2**63 - 1)

    @torch.no_grad()
    def store(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors [one per parameter] into this row."""
        torch._foreach_copy_(self.tensors, list(tensors))

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copies this row into tensors [one per parameter], in place."""
        torch._foreach_copy_(list(tensors), self.tensors)


class ParameterLayout:
    """Where each parameter lies in a row.

    Args:
        parameters: The parameters, in the order of the optimizer's groups.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.device = self.parameters[0].device
        self.numel = sum(p.numel() for p in self.parameters)
        self._kinds = [_kind(p) for p in self.parameters]
        self._offsets = [0] * len(self.parameters)
        self._spans: list[tuple[torch.dtype, int, int]] = []
        end = 0
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            start = end = -(-end // _ALIGNMENT) * _ALIGNMENT
            for index, p in enumerate(self.parameters):
                if p.dtype == dtype:
                    self._offsets[index] = end
                    end += p.numel() * p.element_size()
            self._spans.append((dtype, start, end))
        self.row_bytes = -(-end // _ALIGNMENT) * _ALIGNMENT

    @property
    def digest(self) -> int:
        """63-bit hash of shapes and dtypes, equal on ranks that hold the same parameters."""
        text = repr([(tuple(shape), str(dtype)) for shape, dtype, *_ in self._kinds])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1

    def describes(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the same tensor objects, of the same kind, trained or frozen as before."""
        return len(parameters) == len(self.parameters) and all(
            p is q and _kind(p) == kind
            for p, q, kind in zip(parameters, self.parameters, self._kinds, strict=True)
        )

    def scratch(self) -> Tensor:
        """An uninitialised float64 tensor as long as the longest segment of a row."""
        longest = max(
            (end - start) // dtype.itemsize * (2 if dtype.is_complex else 1)
            for dtype, start, end in self._spans
        )
        return torch.empty(longest, dtype=torch.float64, device=self.device)

    def row(self, buffer: Tensor | None = None) -> Row:
        """Makes a row, on a given uint8 buffer [row_bytes] or a new zeroed one."""
        if buffer is None:
            buffer = torch.zeros(self.row_bytes, dtype=torch.uint8, device=self.device)
        segments = []
        for dtype, start, end in self._spans:
            flat = buffer[start:end].view(dtype)
            segments.append(torch.view_as_real(flat).flatten() if dtype.is_complex else flat)
        tensors = [
            buffer[at : at + p.numel() * p.element_size()].view(p.dtype).view(p.shape)
            for at, p in zip(self._offsets, self.parameters, strict=True)
        ]
        return Row(buffer, segments, tensors)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters now, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    return parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad
