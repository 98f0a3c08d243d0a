"""What to do about a change of the closure's surroundings: nothing, look closer, or drop what was evaluated ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 3
ITSELF = "the closure"
"""The name of the closure where another one is given."""
OFTEN = 8
"""Drops in a row after which the user hears that nothing runs ahead, and only the head is evaluated."""
_REMEDY = (
    "If it differs at every step, compute it inside the closure from the step: `batches = StepIndexedLoader(loader)`, "
    "then `def closure(step): batch = batches.batch(step)`"
)


@dataclass(frozen=True)
class Keep:
    """Use the queued drift."""


@dataclass(frozen=True)
class Recheck:
    """Evaluate the next queued drift again; then call `harmless` or `harmful` with the names."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Drop:
    """Drop the queue and evaluate anew."""

    names: tuple[str, ...]


Verdict = Keep | Recheck | Drop


class OuterChanges:
    """Judges changes that the loop made between two steps.

    Another closure drops the queue: it may return something else, even where its gradient is the same.
    At tolerance 0 a change drops the queue. At another tolerance the next queued drift is first evaluated again: what
    changes at every step and does no harm (a counter, a log, a progress bar) must not stop running ahead.

    Attributes:
        dropped: How often a change dropped the queue.
        names: How often each name was among the changes that did.
        ignored: Names that changed since the queue was evaluated and counted as harmless.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self.names: Counter[str] = Counter()
        self.ignored: set[str] = set()
        self._harmless: set[str] = set()
        self._in_a_row = 0
        self._unsaid: str | None = None
        self._said: set[str] = set()

    def look(self, changed: Sequence[str], *, exact: bool, queued: bool) -> Verdict:
        """Says what to do, before a drift is taken from the queue.

        Args:
            changed: The names of what differs from when the queue was evaluated.
            exact: Whether the tolerance is 0.
            queued: Whether there is a queued drift; otherwise nothing was evaluated before the change.
        """
        if not queued:
            return Keep()
        if (exact and changed) or ITSELF in changed:
            self._drop(changed, exact=exact)
            return Drop(tuple(changed))
        suspects = tuple(name for name in changed if name not in self._harmless)
        self.ignored.update(self._harmless.intersection(changed))
        if suspects:
            return Recheck(suspects)
        self._in_a_row = 0
        return Keep()

    def harmless(self, names: Iterable[str]) -> None:
        """The queued drift came out the same: these names are left to the audit from now on."""
        names = set(names)
        self._harmless |= names
        self.ignored |= names
        self._in_a_row = 0

    def harmful_after_all(self) -> None:
        """A later queued drift came out differently: the queue is to be dropped, and what was ignored rechecked."""
        names = sorted(self.ignored)
        self._harmless.difference_update(names)
        self._drop(names, exact=False)

    def harmful(self, names: Sequence[str]) -> None:
        """The queued drift came out differently: the queue is to be dropped."""
        self._drop(names, exact=False)

    def message(self) -> str | None:
        """What the user is to be told now, once each: the first drop, and that nothing runs ahead any more."""
        text, self._unsaid = self._unsaid, None
        return text

    def _drop(self, names: Sequence[str], *, exact: bool) -> None:
        self.dropped += 1
        self.names.update(names)
        self._in_a_row += 1
        if self._in_a_row == OFTEN:
            self._say("often", self._nothing_ahead(names, exact))
        else:
            self._say("first", self._first(names, exact))

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._unsaid = text

    @staticmethod
    def _first(names: Sequence[str], exact: bool) -> str:
        why = "" if exact or ITSELF in names else ", and the gradient with it"
        return (
            f"{_listed(names)} changed between two steps{why}: what was evaluated ahead is dropped and evaluated again "
            "(no result is wrong; warned once, counted in stats)"
        )

    @staticmethod
    def _nothing_ahead(names: Sequence[str], exact: bool) -> str:
        also = "; keep counters and logs out of it, or give a tolerance above 0" if exact else ""
        return (
            f"{_listed(names)} changed before each of the last {OFTEN} steps, so that nothing runs ahead: the results "
            f"are right, but slower than without picardopt. {_REMEDY}{also}"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    rest = len(names) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
