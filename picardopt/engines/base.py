"""The interface of engines, which evaluate a window's drifts. They know nothing of tolerances or closures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.layout import ParameterLayout, Row

if TYPE_CHECKING:
    from picardopt.joint import JointEvaluation


@dataclass(frozen=True)
class SweepHeader:
    """Describes the sweep that a rank is about to compute; must be the same on all ranks.

    Attributes:
        step: The head's step.
        sweep: Number of earlier sweeps.
        slots: Drifts to evaluate.
        window: The configured window.
        seed: Hash of the run's seed.
        options: Hash of the other deciding options: tolerance, predictor, total_steps, audit, nonfinite.
        layout: Digest of the parameters' shapes and dtypes.
        parameters: Fingerprint of the head's bits.
    """

    step: int
    sweep: int
    slots: int
    window: int
    seed: int
    options: int
    layout: int
    parameters: int

    def as_list(self) -> list[int]:
        """Returns the fields in order, as 64-bit integers."""
        return [int(value) for value in astuple(self)]

    @classmethod
    def names(cls) -> list[str]:
        """Returns the fields' names, in the order of `as_list`."""
        return [field.name for field in fields(cls)]


class Engine(Protocol):
    """Evaluates windows."""

    @property
    def rank(self) -> int:
        """This process's rank."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks, on all axes."""
        ...

    @property
    def data_size(self) -> int:
        """Number of ranks that share a slot."""
        ...

    def start(self, layout: ParameterLayout, head: Row, header: SweepHeader) -> None:
        """Checks that the ranks agree and broadcasts rank 0's parameters."""
        ...

    def evaluate(
        self,
        layout: ParameterLayout,
        evaluate: EvaluateSlot,
        header: SweepHeader,
        joint: JointEvaluation | None = None,
    ) -> tuple[list[Drift], int]:
        """Evaluates slots 0 .. header.slots-1; on a data axis each drift is the mean over a row of ranks.

        Args:
            layout: The live tensors.
            evaluate: Evaluates one slot.
            header: What the ranks must agree on.
            joint: See `evaluate_many`.

        Returns:
            The drifts in order of slots, the same on every rank, ending at the first that is not finite;
            and the number of evaluations over all ranks.

        Raises:
            BaseException: The interruption of a closure on any rank (Ctrl-C, SystemExit), at once.
        """
        ...

    def evaluate_many(
        self,
        evaluate: EvaluateSlot,
        slots: Sequence[int],
        rows: Sequence[Row],
        until: Outcome,
        joint: JointEvaluation | None = None,
    ) -> list[Drift]:
        """Evaluates this rank's slots, one after the other unless their calls can be joined.

        Args:
            evaluate: Evaluates one slot.
            slots: Slots of the window, in order.
            rows: Receive their gradients.
            until: Stop after the first drift whose outcome is this one or worse.
            joint: Evaluates several slots in turns, joining their batched calls; None: one after the other.

        Returns:
            The drifts, in order of slots.
        """
        ...

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """Averages a drift that all ranks of a data row evaluated at once; its row is overwritten.

        Returns:
            The mean, the same on all of them, with the worst of their outcomes.
        """
        ...

    def agree(
        self, table: Tensor, columns: int, numbers: Tensor | None = None
    ) -> tuple[list[list[float]], list[float]]:
        """Returns rank 0's numbers, on the host of every rank.

        Args:
            table: float64 tensor [rows, n]; n may differ by rank, where a rank's rollout ended early.
            columns: Largest possible n.
            numbers: More of them, float64 [any length, the same on every rank].

        Returns:
            Rank 0's rows, cut to the smallest n of all ranks; and its other numbers.
        """
        ...

    def share_numbers(
        self, values: list[int], error: BaseException | None = None
    ) -> list[list[int]]:
        """Returns the integers of every rank, by rank.

        Args:
            values: This rank's integers: a few, the same number on every rank.
            error: The error that is about to end this rank, if any.
        """
        ...


class ManySlots:
    """Evaluates a rank's slots; see `Engine.evaluate_many`."""

    def evaluate_many(
        self,
        evaluate: EvaluateSlot,
        slots: Sequence[int],
        rows: Sequence[Row],
        until: Outcome,
        joint: JointEvaluation | None = None,
    ) -> list[Drift]:
        """See `Engine.evaluate_many`."""
        drifts: list[Drift] = []
        if joint is not None and len(slots) > 1:
            drifts = joint.evaluate_many(evaluate, slots, rows, until)
        for slot, row in list(zip(slots, rows, strict=False))[len(drifts) :]:
            if drifts and drifts[-1].outcome >= until:
                break
            drifts.append(evaluate(slot, row))
        return drifts


def usable_prefix(drifts: Sequence[Drift]) -> list[Drift]:
    """Returns a window's drifts up to the first that is not finite: no later one can be kept."""
    for index, drift in enumerate(drifts):
        if drift.outcome is not Outcome.FINITE:
            return list(drifts[: index + 1])
    return list(drifts)
