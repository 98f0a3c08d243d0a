"""Remembers which closures make batched calls, and when these must be made slot by slot.

Gradients evaluated with joined calls equal those of one slot alone to rounding only. The audit compares bits: what it
evaluates again must have been evaluated alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from picardopt.closure import StepClosure
from picardopt.drift import Calls, Drift

WHILE_IT_WAITS = (
    "other slots' closures run while it waits for a batched call. Leave nothing changed around the call (a module's "
    "flag, an adapter, a generator or a buffer of your own): change it inside the batched function, or after the call"
)
_MOST_CLOSURES = 64  # remembered at once


@dataclass
class SharedBy:
    """What is known of one closure's batched calls.

    Attributes:
        seen: Whether it makes any.
        compared: Whether a gradient with joined calls was compared with that of the slot alone.
        given_up: Whether it works on the main thread only, so that its calls are not joined any more.
    """

    seen: bool = False
    compared: bool = False
    given_up: bool = False


class CallSharing:
    """Decides whether a sweep may join the batched calls of its closure."""

    def __init__(self) -> None:
        self._known: dict[object, SharedBy] = {}  # by the closure's code
        self._alone = False

    def of(self, closure: StepClosure) -> SharedBy:
        """Returns what is known of a closure."""
        if closure.code not in self._known and len(self._known) >= _MOST_CLOSURES:
            self._known.clear()
        return self._known.setdefault(closure.code, SharedBy())

    def learn(self, closure: StepClosure, drifts: Iterable[Drift]) -> None:
        """Notes whether a closure makes batched calls, from drifts that are the same on every rank."""
        if any(drift.calls is not Calls.NONE for drift in drifts):
            self.of(closure).seen = True

    def comparable(self, drift: Drift) -> bool:
        """Returns whether a drift has the bits of a slot alone; if not, the next sweep's will."""
        joined = drift.calls is Calls.JOINED
        self._alone |= joined
        return not joined

    def allowed(self, closure: StepClosure) -> SharedBy | None:
        """Returns what is known of a closure whose calls this sweep may join, else None; to be asked once a sweep."""
        alone, self._alone = self._alone, False
        found = self.of(closure)
        return found if found.seen and not (alone or found.given_up) else None
