"""When queued drifts are evaluated again to check the closure, and which modules are watched meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from picardopt.audit.buffers import BufferGuard
from picardopt.audit.gradients import GradientClearing
from picardopt.audit.modules import live_modules, uses_compile
from picardopt.audit.surroundings import OuterChanges
from picardopt.layout import ParameterLayout
from picardopt.rng import step_seed

MODES = ("auto", "always", "never")
_FIRST_SWEEPS = 3
_LONGEST_GAP = 1000  # sweeps


class Audit:
    """When to check; what is known of closures from one window to the next.

    Attributes:
        mode: As given.
        clearing: Which gradients a closure does not clear.
        changes: Which changes of what a closure sees did harm.
        drops_in_a_row: How many queues in a row were dropped because of such changes; the same on all ranks.
        modules: Modules that ran in closures so far.

    Args:
        mode: "auto" (in the first sweeps, then ever more rarely), "always" (every step) or "never".

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"audit={mode!r}: give one of {', '.join(map(repr, MODES))}")
        self.mode = mode
        # By whether the drift was evaluated ahead, beyond its sweep's head. A check of the head, all there is while
        # strides are 1, sees little: it must not use up the checks of the others.
        self._done = {False: 0, True: 0}
        self._next = {False: 0, True: 0}
        self.clearing = GradientClearing()
        self.changes = OuterChanges()
        self.drops_in_a_row = 0
        self._searched = False
        self.modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Modules are held by weak references: they cannot be pickled, and are found again.
        lost = ("modules", "clearing")
        kept = {key: value for key, value in vars(self).items() if key not in lost}
        return {**kept, "_searched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, modules=weakref.WeakSet(), clearing=GradientClearing())

    def due(self, sweep: int, *, ahead: bool) -> bool:
        """Whether a drift of this sweep is to be evaluated again: the head's, or one beyond it."""
        return self.mode == "always" or (self.mode == "auto" and sweep >= self._next[ahead])

    def draws(self, slot: int, stride: int, seed: int, sweep: int) -> bool:
        """Whether this slot of a sweep's stride is the one to check; the same on every rank.

        It is drawn among the slots beyond the head, so that each phase of what changes now and then is met. With mode
        "always" it is every slot.
        """
        if self.mode == "always":
            return True
        return slot == (1 + step_seed(seed, ~sweep) % (stride - 1) if stride > 1 else 0)

    def passed(self, sweep: int, *, ahead: bool) -> None:
        """Plans the next check after one that found nothing."""
        self._done[ahead] += 1
        following = sweep + 1 if self._done[ahead] < _FIRST_SWEEPS else 2 * sweep + 1
        self._next[ahead] = min(following, sweep + _LONGEST_GAP)

    def watches(self, sweep: int) -> bool:
        """Whether module buffers are watched while this sweep's closures run."""
        return self.due(sweep, ahead=False) and self.due(sweep, ahead=True)

    @property
    def ran(self) -> list[torch.nn.Module]:
        """The modules that were seen to run; none where `modules` are all of the process."""
        return [] if self._searched else list(self.modules)

    def guard(self, layout: ParameterLayout, rewritten: Sequence[Tensor]) -> BufferGuard:
        """Watches what one call of the closure leaves behind; `rewritten` may change."""
        compiles = uses_compile()
        if compiles and not self._searched:
            self.modules.update(live_modules())
            self._searched = True
        return BufferGuard(self.modules, layout, rewritten, find=not compiles)
