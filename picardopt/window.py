"""The window's iterates: hold, shift, truncate, extend. Knows nothing of optimizers or ranks.

Algorithm 2 keeps ``theta[tau .. tau+p]``. Rows are buffers that wander between the window and a pool of
spares; nothing is cloned.
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
        """Takes a row whose content is of no use to anybody."""
        return self._spares.pop() if self._spares else self._layout.row()

    def release(self, rows: Sequence[Row]) -> None:
        """Gives rows back."""
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
        """Makes the next iterate the head; returns the old head's row, now the caller's."""
        old = self.rows.pop(0)
        if not self.rows:
            row = self.spare()
            row.copy_(old)
            self.rows.append(row)
        return old

    def refine(self, rows: Sequence[Row], stride: int) -> None:
        """Takes over a sweep's iterates t+1, t+2, ... from `stride` on; earlier guesses stay.

        The guesses before `stride` are within tolerance and are the points at which the accepted
        drifts were evaluated: commits are compared with them. Whatever lay behind the refined iterates is
        dropped, the caller extends.

        Args:
            rows: The sweep's new iterates t+1 .. t+len(rows); the window takes them over.
            stride: How many steps the sweep made final, 1 .. len(rows).
        """
        self._spares.extend(self.rows[stride:])
        self._spares.extend(rows[: stride - 1])
        self.rows = self.rows[:stride] + list(rows[stride - 1 :])
