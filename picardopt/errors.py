"""The errors and the one warning that picardopt raises of its own."""

from __future__ import annotations


class PicardError(RuntimeError):
    """Base of all errors that are about running ahead, not about the user's own step."""


class UnsupportedOptimizerError(PicardError, TypeError):
    """The base optimizer cannot be stepped from gradients alone."""


class ImpureClosureError(PicardError):
    """The closure is not a function of (parameters, step)."""


class NonFiniteGradientError(PicardError, ArithmeticError):
    """The gradient of the present step, at committed parameters, has a NaN or an infinity."""


class NoGradientError(PicardError):
    """The closure of the present step left every parameter without a gradient."""


class RankMismatchError(PicardError):
    """The ranks disagree about what is being computed."""


class RankLostError(PicardError):
    """A rank died, left, or did not answer in time.

    On gloo the connections of the groups that were used are closed when a rank died or left, so that every other rank
    hears of it at once: nothing more can be sent through them.
    """


class DesynchronizedError(PicardError):
    """An earlier exchange was cut off half way, so the ranks can no longer talk safely."""


class RemoteClosureError(PicardError):
    """Another rank's closure raised something that cannot be rebuilt on this rank."""


class CheckpointError(PicardError, ValueError):
    """A checkpoint could not be written, read or loaded; nothing was changed."""


class PicardWarning(UserWarning):
    """Something costs speed, not correctness."""
