"""The short message that precedes every other one: where a rank is in the program, and what it is about to do."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picardopt.engines.base import SweepHeader
from picardopt.errors import RankMismatchError

LENGTH = 16  # int64 words of every header, whatever its kind

Table = np.ndarray[Any, np.dtype[np.int64]]
"""A line for each rank."""


class Kind(enum.IntEnum):
    """Where in the program a rank is."""

    START = 0x70696361_01
    SWEEP = 0x70696361_02
    FLAG = 0x70696361_03


def words(kind: Kind, values: Sequence[int]) -> Tensor:
    """Returns a header, int64 [LENGTH]."""
    return torch.tensor([kind, *values, *[0] * (LENGTH - 1 - len(values))], dtype=torch.int64)


def read(kind: Kind, received: Tensor, labels: Sequence[int]) -> Table:
    """Returns the values of every rank, int64 [ranks, LENGTH - 1].

    Args:
        kind: This rank's own.
        received: uint8 tensor [ranks, 8 LENGTH].
        labels: The ranks, as printed in errors.

    Raises:
        RankMismatchError: If a rank sent a header of another kind.
    """
    table: Table = received.view(torch.int64).cpu().numpy()
    if (table[:, 0] != kind).any():
        kinds = (_KINDS.get(word, word) for word in table[:, 0].tolist())
        listed = ", ".join(f"rank {r}: {name}" for r, name in zip(labels, kinds, strict=True))
        raise RankMismatchError(
            f"the ranks are in different places of the program ({listed}): call step equally often, and "
            "change parameters or options on all ranks alike"
        )
    return table[:, 1:]


def compare(table: Table, ignore: Sequence[str] = ()) -> None:
    """Compares the ranks' `SweepHeader`s, except for some fields.

    Args:
        table: Their words, by rank.
        ignore: Fields that may differ.

    Raises:
        RankMismatchError: If they differ.
    """
    for name, column in zip(SweepHeader.names(), table.T, strict=False):
        if name not in ignore and (column != column[0]).any():
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(column))
            raise RankMismatchError(
                f"the ranks disagree about {_MEANING[name]} ({listed}): build the same model and optimizer on "
                "every rank, call step equally often, and change parameters on all ranks alike"
            )


_KINDS = {
    Kind.START: "construction",
    Kind.SWEEP: "a sweep",
    Kind.FLAG: "a check of a queued step",
}
_MEANING = {
    "step": "the step",
    "sweep": "the number of sweeps",
    "slots": "the number of slots",
    "window": "the window",
    "seed": "the seed",
    "options": "an option (tolerance, secants, predictor, total_steps, nonfinite, audit)",
    "layout": "the parameters' shapes or dtypes",
    "parameters": "the parameters' values",
}
