"""Items of a generator or another stream, addressed by step, as running ahead needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from picardopt.rng import step_rng

_KEPT = 64
"""Items kept behind the one asked for, where no optimizer says what it may still need."""
_MOST = 1024
"""Items kept at once: more than any window needs."""
_OLDEST: ContextVar[int | None] = ContextVar("picardopt.oldest_step", default=None)


@contextmanager
def needed_from(step: int) -> Iterator[None]:
    """Tells sources, inside the block, the oldest step that may still be evaluated."""
    token = _OLDEST.set(step)
    try:
        yield
    finally:
        _OLDEST.reset(token)


class StepIndexedSource:
    """Gives the item that a loop would draw at step t, in any order and any number of times within a window.

    It is for items that can only be read in order: those of generators, iterable datasets, queues. It draws them in
    order, one per step, each once, and keeps those that the optimizer may still need::

        source = StepIndexedSource(DataLoader(iterable_dataset, batch_size=4))

        def closure(step):
            images, labels = source(step)

    A draw has random numbers of its own, seeded from (seed, step): it takes none from the step that happens to ask
    first. Every rank draws the whole stream, so it must be the same on each. The same object is returned whenever an
    item is asked for: do not write into it.

    Args:
        draw: A function without arguments that returns the next item; or an iterator (a generator), which may end; or
            an iterable (a DataLoader, an iterable dataset), which starts again at its end, as in a loop over epochs.
        seed: Seeds what the draws take from the global generators.
        start: The step of the first item: above 0 for a stream that has been moved forward, to resume without drawing
            what went before.

    Raises:
        TypeError: If `draw` is none of these.
        ValueError: If `start` is negative.
    """

    def __init__(
        self, draw: Callable[[], Any] | Iterable[Any], *, seed: int = 0, start: int = 0
    ) -> None:
        if start < 0:
            raise ValueError(f"start={start}: steps are counted from 0")
        # One object further in than a closure's surroundings are compared: a draw is no change that the loop made.
        self._stream = _Stream(_function(draw), seed, start)

    def __call__(self, step: int) -> Any:
        """Returns the item of a step.

        Args:
            step: Index of the step.

        Raises:
            IndexError: If the item is no longer kept, lies before `start`, or the iterator ended before it.
            Exception: What drawing it, or an item before it, raised. Drawing is not tried again.
        """
        return self._stream.item(step)


class _Stream:
    """The items from the oldest step that may be needed to the newest that was asked for."""

    def __init__(self, draw: Callable[[], Any], seed: int, start: int) -> None:
        self._draw, self._seed, self._start = draw, seed, start
        self._items: deque[Any] = deque()
        self._first = start  # the step of the oldest item
        self._error: BaseException | None = None  # what the first draw that failed raised

    def item(self, step: int) -> Any:
        if step < self._first:
            raise IndexError(self._too_old(step))
        oldest = _OLDEST.get()
        self._check(step, oldest)
        before = step - _KEPT if oldest is None else min(step, oldest)
        self._forget(before)
        while step >= self._first + len(self._items):
            self._append(self._first + len(self._items))
            self._forget(before)
        return self._items[step - self._first]

    def _append(self, step: int) -> None:
        """Draws the item of the next step."""
        if self._error is not None:
            raise self._again(step)
        try:
            with step_rng(self._seed, -1 - step):
                item = self._draw()
        except BaseException as error:
            self._error = error
            if isinstance(error, StopIteration):
                raise self._again(step) from None
            raise
        self._items.append(item)

    def _again(self, step: int) -> BaseException:
        """What to raise for an item that could not be drawn."""
        error = self._error
        if isinstance(error, StopIteration):
            count = step - self._start
            return IndexError(
                f"the source ended after {count} items, before step {step}: end the loop there and give the optimizer "
                f"total_steps={step}, so that nothing beyond is evaluated ahead; or give an iterable that can be "
                "begun anew, such as a DataLoader"
            )
        if isinstance(error, Exception):
            return error.with_traceback(None)  # its frames would hold the closure's tensors
        return RuntimeError(
            f"drawing the item of step {step} was interrupted ({error!r}), so that nobody knows what comes next: make "
            f"a new source, with start={step} and a stream that begins there"
        )

    def _forget(self, before: int) -> None:
        while self._items and self._first < before:
            self._items.popleft()
            self._first += 1

    def _check(self, step: int, oldest: int | None) -> None:
        if oldest is not None and step - oldest >= _MOST:
            raise IndexError(
                f"step={step} was asked for while the optimizer is at step {oldest}: the source keeps at most {_MOST} "
                "items. Ask for the closure's own step; if that needs several items, let draw return them together: "
                "StepIndexedSource(lambda: [next(stream) for _ in range(4)])"
            )

    def _too_old(self, step: int) -> str:
        if step < 0:
            return f"step={step}: steps are counted from 0"
        if step < self._start:
            return f"step={step}: the source begins at step {self._start} (start={self._start})"
        return (
            f"step={step}: the source keeps items from step {self._first} on. Ask for the closure's own step; after "
            "loading an earlier checkpoint, make a new source"
        )


def _function(draw: Any) -> Callable[[], Any]:
    """Returns what draws the next item."""
    if isinstance(draw, Iterator):
        return draw.__next__
    if isinstance(draw, Iterable):
        return _endless(draw).__next__
    if callable(draw):
        return draw  # type: ignore[no-any-return]
    raise TypeError(
        f"draw={draw!r}: give a function without arguments that returns the next item, an iterator or an iterable (for "
        "a map-style DataLoader: StepIndexedLoader)"
    )


def _endless(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the items of an iterable over and over."""
    while True:
        count = 0
        for item in items:
            count += 1
            yield item
        if not count:
            raise ValueError(
                f"the source's {type(items).__name__} gave no item when it was started again at its end: give an "
                "iterable that can be iterated more than once"
            )
