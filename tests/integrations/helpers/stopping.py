"""Runs that end inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from picardopt_3d.methods import Stage
from picardopt_3d.problem import Losses


class Stop(Exception):
    """Ends a run from inside a step."""


@contextmanager
def stopped(
    kind: type[Stage], at: int, of: Callable[[Any], bool] = lambda stage: True
) -> Iterator[None]:
    """Ends what is run within, by an error in the loss at a step; ahead of time it only shortens a stride.

    Args:
        kind: The kind of stage whose loss raises.
        at: The step.
        of: Which stages of this kind it is.
    """
    whole = kind.loss

    def loss(self: Stage, step: int) -> Losses:
        if step >= at and of(self):
            raise Stop
        return whole(self, step)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failed speculation warns once
        patch.setattr(kind, "loss", loss)
        with pytest.raises(Stop):
            yield
