"""NumPy's global generator: its state, read and set no more often than it changes.

Reading the state takes 50 us and setting it as long, for it is copied word by word: as much as a step of Adam on 10,000
numbers. Whether it has changed is told by the generator's memory, which a step that draws nothing leaves alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

NumpyState = dict[str, Any] | tuple[int, int]
"""A state as NumPy returns it, or the two words that it was seeded with and has not changed since."""

_WORDS = 624  # of 32 bits; the position among them follows
_SIZE = 4 * _WORDS + 4


class NumpyGenerator:
    """The generator behind ``np.random.rand`` and the like.

    A normal number that waits to be drawn lies outside that memory. It is lost where a program puts a state with one
    back by itself, at the very words that were noted without.
    """

    def __init__(self) -> None:
        self._known: NumpyState = (0, 0)
        self._memory: bytes | None = None  # of the generator in the state `_known`

    def state(self) -> NumpyState:
        """Returns the present state; draws nothing."""
        if not self._unchanged():
            self._note(np.random.get_state(legacy=False))
        return self._known

    def restore(self, state: NumpyState) -> None:
        """Sets the state, or seeds with two words of 32 bits."""
        if self._unchanged() and state is self._known:
            return
        if isinstance(state, tuple):
            np.random.seed(list(state))
        else:
            np.random.set_state(state)
        self._note(state)

    def _note(self, state: NumpyState) -> None:
        # A normal number that waits to be drawn lies elsewhere: such a state is not known by the memory.
        waiting = isinstance(state, dict) and state["has_gauss"]
        self._known, self._memory = state, None if waiting else _memory()

    def _unchanged(self) -> bool:
        return self._memory is not None and self._memory == _memory()


def equal_states(one: Any, other: Any) -> bool:
    """Returns whether two states of `NumpyGenerator.state` are the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal_states(one[k], other[k]) for k in one)
    return one is other or bool(np.array_equal(one, other))


def _memory() -> bytes | None:
    """Returns the words and the position of NumPy's global Mersenne Twister; None for another generator."""
    generator = np.random.mtrand.get_bit_generator()  # loaded with its first use
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _SIZE)


NUMPY = NumpyGenerator()
