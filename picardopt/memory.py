"""What running ahead takes in memory, as pure functions of numbers; and an error that says so where it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch

from picardopt.errors import WindowMemoryError

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad alloc")
"""Parts of torch's messages: the CPU's allocator has no error class of its own."""


@dataclass(frozen=True)
class Memory:
    """Bytes that running ahead takes on every rank besides what the plain loop takes, at most.

    Attributes:
        iterates: The window before and after a sweep.
        drifts: One for each slot of the window, and one for each rank that shares a step.
        gradients: The last step's while others are computed, and those with which the audit tests a closure.
        pair: A guess and its drift, from which drift errors are measured.
        secants: The pairs of drifts that correct drifts.
        snapshot: The optimizer's state once more, to be put back after a rollout.
    """

    iterates: int
    drifts: int
    gradients: int
    pair: int
    secants: int
    snapshot: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    def __str__(self) -> str:
        names = {
            "iterates": self.iterates,
            "drifts": self.drifts,
            "gradients": self.gradients,
            "a pair of drifts": self.pair,
            "secants": self.secants,
            "the optimizer's state once more": self.snapshot,
        }
        parts = ", ".join(f"{name} {size(count)}" for name, count in names.items() if count)
        return f"{size(self.total)} ({parts})"


def memory(
    window: int,
    row_bytes: int,
    state_bytes: int = 0,
    *,
    exact: bool = False,
    secants: int = 0,
    secant_bytes: int | None = None,
    data: int = 1,
) -> Memory:
    """Returns what a window takes: 2 p + 1 iterates, p drifts, 2 gradients, a pair, 2 m for m secants, the state.

    A window of 1 rolls nothing out: two iterates, a drift and the gradients.

    Args:
        window: Steps evaluated per sweep, p.
        row_bytes: Bytes of the parameters (and the carry): of an iterate, a drift or a gradient.
        state_bytes: Bytes of the optimizer's state.
        exact: Whether the tolerance is 0: no drift errors are measured, and nothing is corrected.
        secants: Pairs of drifts that correct others, m.
        secant_bytes: Bytes of half a pair (float32 or finer, of the measured parameters); default: `row_bytes`.
        data: Ranks that share a step: each of them receives the others' gradients.
    """
    ahead = window > 1
    measured = ahead and not exact
    half = row_bytes if secant_bytes is None else secant_bytes
    return Memory(
        iterates=(2 * window + 1 if ahead else 2) * row_bytes,
        drifts=(window + (data if data > 1 else 0)) * row_bytes,
        gradients=2 * row_bytes,
        pair=2 * row_bytes if measured else 0,
        secants=2 * secants * half if measured else 0,
        snapshot=state_bytes if ahead else 0,
    )


def size(count: float) -> str:
    """Returns a number of bytes with three significant figures."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    whole = count >= 100 or units[0] == "bytes"
    return f"{count:.0f} {units[0]}" if whole else f"{count:.3g} {units[0]}"


@contextmanager
def allocation(of: str, count: int, device: torch.device) -> Iterator[None]:
    """Turns a lack of memory inside the block into `WindowMemoryError`; other errors pass.

    Args:
        of: What is allocated.
        count: Its bytes.
        device: Where.

    Raises:
        WindowMemoryError: If there is no memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise WindowMemoryError(f"no memory for {size(count)} of {of} on {device}") from error


def lacks_memory(error: BaseException) -> bool:
    """Returns whether an error says that there is no more memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _SIGNS)


def explained(
    error: WindowMemoryError, window: int, needed: Callable[[int], Memory]
) -> WindowMemoryError:
    """Returns the error with what the window takes, and what to do.

    Args:
        error: What was found.
        window: The window.
        needed: Returns what a window takes.
    """
    own, ways = needed(window), []
    if window > 1:
        ways.append(f"window={window // 2} takes {size(needed(window // 2).total)}")
    if own.secants:
        ways.append(f"secants=0 takes {size(own.total - own.secants)}")
    text = f"{error}: besides the plain loop's own memory a window of {window} takes {own}"
    return WindowMemoryError("; ".join([text, *ways]))
