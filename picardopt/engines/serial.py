"""One process evaluates a window's slots one after the other: no speed, the same results."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from picardopt.drift import Drift, Outcome
from picardopt.engines.base import Claim, EvaluateSlot
from picardopt.layout import ParameterLayout, Row
from picardopt.mesh import ForeignModules
from picardopt.stats import Stats


class SerialEngine:
    """Evaluates every slot in this process.

    Args:
        stats: Where the seconds go.
    """

    rank = 0
    size = 1
    data_size = 1

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._layout: ParameterLayout | None = None
        self._rows: list[Row] = []
        self._modules = ForeignModules(None)

    def start(self, layout: ParameterLayout, head: Row, claim: Claim) -> None:
        """Has nobody to agree with."""

    def evaluate(
        self, layout: ParameterLayout, evaluate: EvaluateSlot, claim: Claim
    ) -> tuple[list[Drift], int]:
        """Evaluates the slots in order and stops at the first that cannot be used."""
        if layout is not self._layout:
            self._layout, self._rows = layout, []
        while len(self._rows) < claim.slots:
            self._rows.append(layout.row())
        drifts: list[Drift] = []
        with self._stats.phase("drift"):
            for slot in range(claim.slots):
                row = self._rows[slot]
                drifts.append(self._modules.evaluate(layout, partial(evaluate, slot, row)))
                if drifts[-1].outcome is not Outcome.FINITE:
                    break
        last = drifts[-1]
        if last.outcome is Outcome.INTERRUPTED and last.error is not None:
            raise last.error
        return drifts, len(drifts)

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """Shares its slots with nobody."""
        return drift

    def agree(self, table: Tensor, columns: int) -> list[list[float]]:
        """Brings the numbers to the host (the sweep's one sync)."""
        told: list[list[float]] = table.tolist()
        return told

    def share_numbers(
        self, values: list[int], error: BaseException | None = None
    ) -> list[list[int]]:
        """This rank's integers."""
        return [values]
