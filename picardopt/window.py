"""The window's iterates: hold, shift, truncate, extend. Knows nothing of optimizers or ranks.

Algorithm 2 keeps ``theta[tau .. tau+p]``. Rows move between the window and a pool of spare rows; none is cloned.
"""

from __future__ import annotations

from collections.abc import Sequence

from picardopt.layout import ParameterLayout, Row


class Window:
    """Iterates t, t+1, ... of the trajectory; `rows[0]` is the head.

    Args:
        layout: Makes the rows.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._spares: list[Row] = []
        self.rows: list[Row] = [layout.row()]

    @property
    def head(self) -> Row:
        """The iterate at the present step; always final."""
        return self.rows[0]

    def spare(self) -> Row:
        """Returns a spare row with arbitrary content."""
        return self._spares.pop() if self._spares else self._layout.row()

    def release(self, rows: Sequence[Row]) -> None:
        """Returns rows to the pool."""
        self._spares.extend(rows)

    def resize(self, count: int) -> None:
        """Truncates to `count` iterates, or repeats the last one (the paper's fill) up to there."""
        while len(self.rows) > count:
            self._spares.append(self.rows.pop())
        while len(self.rows) < count:
            row = self.spare()
            row.copy_(self.rows[-1])
            self.rows.append(row)

    def shift(self) -> Row:
        """Makes the next iterate the head and returns the old head's row, which the caller then owns."""
        old = self.rows.pop(0)
        if not self.rows:
            row = self.spare()
            row.copy_(old)
            self.rows.append(row)
        return old

    def refine(self, rows: Sequence[Row], stride: int) -> None:
        """Replaces the guesses from `stride` on by a sweep's iterates; earlier guesses stay.

        The guesses before `stride` are within tolerance. The accepted drifts were evaluated at them, and commits are
        compared with them. Guesses beyond the new iterates are dropped; the caller extends the window.

        Args:
            rows: The sweep's new iterates t+1 .. t+len(rows); the window then owns them.
            stride: Number of steps that the sweep made final, 1 .. len(rows).
        """
        self._spares.extend(self.rows[stride:])
        self._spares.extend(rows[: stride - 1])
        self.rows = self.rows[:stride] + list(rows[stride - 1 :])
