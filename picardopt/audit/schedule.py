"""The schedule of the audit: when queued drifts are evaluated again, and when modules are watched."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from picardopt.audit.buffers import BufferGuard
from picardopt.audit.gradients import GradientClearing
from picardopt.audit.modules import live_modules, uses_compile
from picardopt.audit.outside import OutsideGradients
from picardopt.audit.sharing import CallSharing
from picardopt.audit.surroundings import OuterChanges
from picardopt.layout import ParameterLayout, Row
from picardopt.rng import step_seed

MODES = ("auto", "always", "never")
_RARER = 8  # times as many sweeps from one check to the next
_LONGEST_GAP = 1000  # sweeps


class Audit:
    """The audit's schedule, and its knowledge of closures and modules, kept from one window to the next.

    Attributes:
        mode: The constructor's argument.
        clearing: The gradients that a closure does not clear.
        sharing: The closures that make batched calls.
        outside: The gradients that closures leave on parameters of others.
        changes: The harmful and harmless changes of the closure's surroundings.
        drops_in_a_row: Number of queues in a row that such changes dropped; the same on all ranks.
        modules: Modules that ran in closures so far.

    Args:
        mode: "auto" (at first, then ever more rarely), "always" (every step) or "never".

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"audit={mode!r}: give one of {', '.join(map(repr, MODES))}")
        self.mode = mode
        # Keyed by whether the drift lies beyond its sweep's head. Checks of the head find little, and while strides are
        # 1 there are no others: they must not use up the checks of later slots.
        self._next = {False: 0, True: 0}
        self.clearing = GradientClearing()
        self.sharing = CallSharing()
        self.outside = OutsideGradients()
        self.changes = OuterChanges()
        self.drops_in_a_row = 0
        self._searched = False
        self.modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled; the modules are found again.
        lost = ("modules", "clearing", "sharing", "outside")
        kept = {key: value for key, value in vars(self).items() if key not in lost}
        return {**kept, "_searched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, modules=weakref.WeakSet(), clearing=GradientClearing(), sharing=CallSharing()
        )
        self.outside = OutsideGradients()

    def due(self, sweep: int, *, ahead: bool) -> bool:
        """Returns whether to evaluate a drift of this sweep again: the head's, or one beyond it."""
        return self.mode == "always" or (self.mode == "auto" and sweep >= self._next[ahead])

    def draws(self, slot: int, stride: int, seed: int, sweep: int) -> bool:
        """Returns whether this slot of a sweep's stride is the one to check; the same on every rank.

        The slot is drawn at random beyond the head, so that changes with any period are met in time. With mode
        "always" every slot is checked.
        """
        if self.mode == "always":
            return True
        return slot == (1 + step_seed(seed, ~sweep) % (stride - 1) if stride > 1 else 0)

    def passed(self, sweep: int, *, ahead: bool) -> None:
        """Schedules the next check after one that found nothing."""
        self._next[ahead] = min(_RARER * (sweep + 1), sweep + _LONGEST_GAP)

    def watches(self, sweep: int) -> bool:
        """Returns whether to watch module buffers during this sweep's evaluations."""
        return self.due(sweep, ahead=False) and self.due(sweep, ahead=True)

    @property
    def ran(self) -> list[torch.nn.Module]:
        """The modules seen to run; empty if `modules` are all modules of the process."""
        return [] if self._searched else list(self.modules)

    def guard(
        self,
        layout: ParameterLayout,
        guess: Row,
        rewritten: Sequence[Tensor],
        seen: Iterable[object] = (),
    ) -> BufferGuard:
        """Returns a context that watches one call of the closure, at a guess, for changed tensors.

        Args:
            layout: The parameters and the carry.
            guess: Their values.
            rewritten: Tensors that may change.
            seen: What the closure can see.
        """
        compiles = uses_compile()
        if compiles and not self._searched:
            self.modules.update(live_modules())
            self._searched = True
        return BufferGuard(self.modules, layout, guess, rewritten, seen, find=not compiles)
