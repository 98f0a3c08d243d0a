"""Evaluates a window's slots one after the other in one process: the same results, no speedup."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picardopt.ddp_guard import DdpGuard
from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.engines.base import ManySlots, SweepHeader
from picardopt.layout import ParameterLayout, Row
from picardopt.stats import Stats, phase

if TYPE_CHECKING:
    from picardopt.joint import JointEvaluation


class SerialEngine(ManySlots):
    """Evaluates every slot in this process.

    Args:
        stats: Times the evaluations.
    """

    rank = 0
    size = 1
    data_size = 1

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._layout: ParameterLayout | None = None
        self._rows: list[Row] = []
        self._guard = DdpGuard(None)

    def start(self, layout: ParameterLayout, head: Row, header: SweepHeader) -> None:
        """Does nothing: there is no other rank."""

    def evaluate(
        self,
        layout: ParameterLayout,
        evaluate: EvaluateSlot,
        header: SweepHeader,
        joint: JointEvaluation | None = None,
    ) -> tuple[list[Drift], int]:
        """Evaluates the slots in order and stops at the first that is not finite."""
        if layout is not self._layout:
            self._layout, self._rows = layout, []
        while len(self._rows) < header.slots:
            self._rows.append(layout.row())
        guarded = self._guard.wrap(layout, evaluate)
        with phase(self._stats, "drift"):
            slots, rows = range(header.slots), self._rows
            drifts = self.evaluate_many(guarded, slots, rows, Outcome.NONFINITE, joint)
        last = drifts[-1]
        if last.outcome is Outcome.INTERRUPTED and last.error is not None:
            raise last.error
        return drifts, len(drifts)

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """Returns the drift itself: there is no other rank."""
        return drift

    def agree(
        self, table: Tensor, columns: int, numbers: Tensor | None = None
    ) -> tuple[list[list[float]], list[float]]:
        """Copies the numbers to the host (one sync)."""
        if numbers is None:
            return table.tolist(), []
        rows, length = table.shape
        flat = torch.cat([table.flatten(), numbers]).tolist()
        return [flat[i * length : (i + 1) * length] for i in range(rows)], flat[rows * length :]

    def share_numbers(
        self, values: list[int], error: BaseException | None = None
    ) -> list[list[int]]:
        """Returns this rank's integers."""
        return [values]
