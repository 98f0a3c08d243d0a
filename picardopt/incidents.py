"""Handles failed evaluations: those of the present step raise, those of later steps only shorten the stride."""

from __future__ import annotations

import math
from collections.abc import Sequence

from picardopt.drift import Drift, Outcome
from picardopt.errors import ImpureClosureError, NonFiniteGradientError, PicardError
from picardopt.stats import Stats
from picardopt.warn import warn_user


class Incidents:
    """Raises the errors of the present step; counts those of later steps and warns about the first.

    Args:
        stats: Counts failed speculations.
        nonfinite: The response to a head whose gradient is not finite: "raise" or "skip".
        warns: Whether this rank warns.
    """

    def __init__(self, stats: Stats, nonfinite: str, *, warns: bool) -> None:
        self._stats, self._nonfinite, self._warns = stats, nonfinite, warns
        self._text = ""

    def usable(self, drifts: list[Drift]) -> list[Drift]:
        """Returns the drifts, without the last one if it lies beyond the head and failed.

        Raises:
            Exception: The closure's own error at the head.
            ImpureClosureError: If the closure is impure anywhere in the window.
            NonFiniteGradientError: If the head's gradient is not finite, with ``nonfinite="raise"``.
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
        # Breaks a reference cycle: the traceback holds the closure's variables and the drift itself.
        last.error = None
        return drifts[:-1]

    def failed_ahead(self, step: int, cause: object) -> None:
        """Counts a failure beyond the head and prepares a warning about the first one."""
        self._stats.failed_speculations += 1
        self._warn_once(
            f"running ahead failed at step {step}, evaluated at a guess; this shortens the stride and changes "
            "no result (warned once, counted in stats.failed_speculations): "
            f"{cause or 'its gradient has a NaN or an infinity'}"
        )

    def check_rollout(
        self, table: Sequence[Sequence[float]], step: int, steps: int, error: Exception | None
    ) -> None:
        """Handles a rollout that the base's own step ended early.

        Args:
            table: The agreed measures, as far as the rollout came on every rank.
            step: Step of the head.
            steps: How many steps this rank's rollout took.
            error: The error that ended it, if one did.

        Raises:
            Exception: The error, if it is the head's.
        """
        if not table[0]:
            raise error or PicardError(
                f"the base optimizer's step failed at step {step} on another rank: see that rank's error for the cause"
            )
        if error is not None:
            self.failed_ahead(step + steps, error)

    def check_residuals(self, residuals: Sequence[float]) -> None:
        """Prepares a warning if the residuals are NaN."""
        if math.isnan(residuals[0]):
            self._warn_once(
                "residuals are NaN: a parameter holds a NaN or an infinity, so no guess can be accepted and every "
                "sweep makes one step final"
            )

    def _warn_once(self, text: str) -> None:
        if self._warns:
            self._warns, self._text = False, text

    def warn(self) -> None:
        """Issues the prepared warning; called last, because a filter may turn it into an error."""
        if self._text:
            text, self._text = self._text, ""
            warn_user(text)
