"""Answers the calls for which slots wait: one call of a function for all slots whose arguments can be joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from picardopt.batched import Question, checked_call, name_of
from picardopt.errors import BatchedCallError
from picardopt.interrupts import interrupts_allowed, raised_by_signal
from picardopt.rows import describe, distance, join, split
from picardopt.stats import Stats
from picardopt.turns import Turn
from picardopt.warn import warn_user

_LARGEST_DIFFERENCE = 1e-2  # of results joined and alone, relative to their length
_NOISE = 8.0  # times the difference that rounding makes by itself


class SharedCalls:
    """Answers slots' questions, in the thread that called the optimizer.

    Args:
        spoil: Gives the live tensors other values, so that a function that reads them is found.
        stats: Counts joined calls.
        join: Whether to join calls; else each is made for its slot alone, while the others wait.

    Attributes:
        joined: The slots of which a call was joined with others'.
    """

    def __init__(self, spoil: Callable[[], None], stats: Stats, *, join: bool = True) -> None:
        self._spoil, self._stats, self._join = spoil, stats, join
        self.joined: set[Turn] = set()

    def answer(self, waiting: Sequence[Turn]) -> None:
        """Answers the questions of all slots that wait."""
        if not self._join:
            for turn in waiting:
                _call_alone(turn)
            return
        groups: list[tuple[Any, list[Turn]]] = []
        for turn in waiting:
            question: Question = turn.question
            key = question.rows_like(), describe(question.kwargs, shared=True)
            same = [group for other, group in groups if other == key]
            if same and not question.function.findings.alone:
                same[0].append(turn)
            else:
                groups.append((key, [turn]))
        for _, group in groups:
            if len(group) == 1:
                _call_alone(group[0])
            else:
                self._call(group)
        if len(groups) == len(waiting) > 1:
            _hint([key for key, _ in groups], [turn.question for turn in waiting])

    def _call(self, group: list[Turn]) -> None:
        """Answers a group's questions, by one call if possible."""
        try:
            answers = self._call_joined(group)
        except BatchedCallError as error:
            for turn in group:
                turn.answer(refusal=BatchedCallError(*error.args))
        except Exception as error:
            if raised_by_signal(error):
                raise
            error.__traceback__ = None  # its frames hold the joined arguments
            errors = [_call_alone(turn) for turn in group]
            if not any(errors):
                _call_alone_from_now_on(group, error)
        else:
            for turn, answer in zip(group, answers, strict=True):
                turn.answer(answer)
            self.joined.update(group)
            self._stats.joined_calls += 1
            self._stats.calls_saved += len(group) - 1

    def _call_joined(self, group: list[Turn]) -> list[Any]:
        questions: list[Question] = [turn.question for turn in group]
        first, counts = questions[0], [question.rows for question in questions]
        findings = first.function.findings
        if not findings.checked:
            self._spoil()
        with torch.no_grad(), torch.profiler.record_function("picardopt.joined_call"):
            args = join([question.args for question in questions])
            answers = split(_call(first, args), counts)
        if not findings.checked:
            _check_rows(group, answers[-1])
            findings.checked = True
        return answers


def _call(question: Question, args: Any) -> Any:
    """Calls a function with the settings of the thread that asks for it."""
    with question.state.applied(), interrupts_allowed():
        return checked_call(question.function, args, question.kwargs)


def _call_alone(turn: Turn) -> Exception | None:
    """Answers one slot's question, with its own values in the live tensors; returns the function's error."""
    with turn.entered():
        try:
            turn.answer(_call(turn.question, turn.question.args))
        except Exception as error:
            if raised_by_signal(error):
                raise
            turn.answer(refusal=error)
            return error
    return None


def _check_rows(group: list[Turn], joined: Any) -> None:
    """Checks that the last slot's rows are those of a call for that slot alone.

    Rounding may be large where a network computes in half precision. What it makes is seen by joining the slot with
    itself, which gives rows that depend on each other nothing new to see.

    Raises:
        BatchedCallError: If they differ by more than rounding.
    """
    turn, question = group[-1], group[-1].question
    with torch.no_grad(), turn.entered():
        alone = _call(question, question.args)
        found = distance(joined, alone)
        if found <= _LARGEST_DIFFERENCE:
            return
        copies = _call(question, join([question.args] * len(group)))
        noise = distance(split(copies, [question.rows] * len(group))[-1], alone)
    if not found <= _NOISE * noise:
        raise BatchedCallError(
            f"{name_of(question.function)} gives other rows when it is called for several slots at once (relative "
            f"difference {found:.2g}): either its rows are not independent (a mean over the batch, BatchNorm in train "
            "mode), or it reads the optimizer's parameters or carry, whose values differ by slot. Pass what differs as "
            "an argument, or do not mark it as batched"
        )


def _call_alone_from_now_on(group: list[Turn], error: Exception) -> None:
    function = group[0].question.function
    function.findings.alone = True
    warn_user(
        f"{name_of(function)} raised {type(error).__name__} ({error}) when it was called once for {len(group)} slots, "
        "but not when it was called for each of them: it is called for each from now on (warned once)"
    )


def _hint(keys: Sequence[Any], questions: Sequence[Question]) -> None:
    """Says, once for each function, that nothing but keyword arguments keeps its calls apart."""
    function = questions[0].function
    if function.findings.hinted or function.findings.alone:
        return
    if any(rows_like != keys[0][0] for rows_like, _ in keys):
        return
    function.findings.hinted = True
    first, rest = questions[0].kwargs, [question.kwargs for question in questions[1:]]
    names = [
        name
        for name, value in first.items()
        if any(
            describe(other.get(name), shared=True) != describe(value, shared=True) for other in rest
        )
    ]
    warn_user(
        f"{name_of(function)} is batched, but called for each slot by itself, because its keyword arguments "
        f"({', '.join(names)}) differ between slots: pass what has one row per item of the batch by position (warned "
        "once)"
    )
