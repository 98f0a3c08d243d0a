"""What to do with evaluations that went wrong: a bad present raises, a bad future only shortens the stride."""

from __future__ import annotations

import math
from collections.abc import Sequence

from picardopt.drift import Drift, Outcome
from picardopt.errors import ImpureClosureError, NonFiniteGradientError
from picardopt.stats import Stats
from picardopt.warn import warn_user


class Incidents:
    """Raises what concerns the present step, and counts and warns about the rest.

    Args:
        stats: Counts failed speculations.
        nonfinite: At a head whose gradient is not finite: "raise" or "skip".
        warns: Whether this rank warns.
    """

    def __init__(self, stats: Stats, nonfinite: str, *, warns: bool) -> None:
        self._stats, self._nonfinite, self._warns = stats, nonfinite, warns
        self._text = ""

    def sort(self, drifts: list[Drift]) -> list[Drift]:
        """Returns the drifts that can be used: all but a last one, beyond the head, that went wrong.

        Raises:
            Exception: What the closure raised at the head.
            ImpureClosureError: If the closure was found to be impure anywhere in the window.
            NonFiniteGradientError: If the head's gradient is not finite and that is to be raised.
        """
        head, last = drifts[0], drifts[-1]
        if isinstance(last.error, ImpureClosureError):
            raise last.error
        if head.error is not None:
            raise head.error
        if head.outcome is Outcome.NONFINITE and self._nonfinite == "raise":
            raise NonFiniteGradientError(
                f"the gradient of step {head.step} has a NaN or an infinity at the committed parameters; nothing "
                'was changed (nonfinite="skip" leaves such steps out)'
            )
        if last is head or last.outcome is Outcome.FINITE:
            return drifts
        self.failed_ahead(last.step, last.trace or last.error)
        # Its traceback holds the closure's variables, and through a frame of ours the drift that holds it.
        last.error = None
        return drifts[:-1]

    def failed_ahead(self, step: int, what: object) -> None:
        """Counts a failure beyond the head; the first one is warned about."""
        self._stats.failed_speculations += 1
        self._warn_once(
            f"running ahead failed at step {step}, evaluated at a guess; this shortens the stride and changes "
            "no result (warned once, counted in stats.failed_speculations): "
            f"{what or 'its gradient has a NaN or an infinity'}"
        )

    def look_at(self, residuals: Sequence[float]) -> None:
        """Warns if no guess can ever be accepted."""
        if math.isnan(residuals[0]):
            self._warn_once(
                "residuals are NaN: a parameter holds a NaN or an infinity, so no guess can be accepted and every "
                "sweep makes one step final"
            )

    def _warn_once(self, text: str) -> None:
        if self._warns:
            self._warns, self._text = False, text

    def warn(self) -> None:
        """Warns now that everything is in place: a filter may turn a warning into an error."""
        if self._text:
            text, self._text = self._text, ""
            warn_user(text)
