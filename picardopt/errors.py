"""The errors and the warning class of picardopt."""

from __future__ import annotations


class PicardError(RuntimeError):
    """Base class of picardopt's errors."""


class UnsupportedOptimizerError(PicardError, TypeError):
    """The base optimizer cannot be stepped from gradients alone."""


class ImpureClosureError(PicardError):
    """The closure is not a function of (parameters, step)."""


class BatchedCallError(PicardError):
    """A function that was given to `picardopt.batched` cannot be called once for several slots."""


class NonFiniteGradientError(PicardError, ArithmeticError):
    """The gradient of the present step, at committed parameters, has a NaN or an infinity."""


class NoGradientError(PicardError):
    """The closure of the present step left every parameter without a gradient."""


class RankMismatchError(PicardError):
    """The ranks were given different models, options or calls."""


class RankLostError(PicardError):
    """A rank died, left, or did not answer in time.

    With gloo, the connections of all groups in use are then closed, so that every other rank fails at once instead of
    waiting for its timeout: nothing more can be sent through these groups.
    """


class DesynchronizedError(PicardError):
    """An earlier exchange was interrupted, so that the ranks can no longer exchange messages safely."""


class RemoteClosureError(PicardError):
    """Another rank's closure raised an exception that cannot be pickled."""


class WindowMemoryError(PicardError, MemoryError):
    """There is no memory for the iterates, drifts or secants of a window; the message says what they take."""


class CheckpointError(PicardError, ValueError):
    """A checkpoint could not be written, read or loaded; nothing was changed."""


class PicardWarning(UserWarning):
    """Something costs speed, not correctness."""
