"""`ParallelPicardOptimizer`: the torch.optim contract around a `Speculator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt.assembly import make_speculator
from picardopt.audit import Audit
from picardopt.audit.wrappers import register
from picardopt.bases import JoinedOptimizer, unmeasured_bases
from picardopt.carry import Carry, as_carry, check_carry, run_update
from picardopt.checks import check_arguments, check_base, check_mode
from picardopt.closure import Closure, Plain, as_step_closure
from picardopt.drift import Accepted
from picardopt.drift_tolerance import DriftTolerance
from picardopt.engines import make_engine
from picardopt.facade import OptimizerFacade
from picardopt.interrupts import interrupts_deferred
from picardopt.layout import parameters_of
from picardopt.options import Options
from picardopt.predictor import Predictor, as_predictor
from picardopt.ranks import make_grid
from picardopt.restructure import Restructure, check_restructure, remap_queue
from picardopt.speculator import Speculator
from picardopt.state import load_state, saved_state
from picardopt.stats import Stats, phase
from picardopt.stepper import BaseStepper
from picardopt.tolerance import Tolerance, as_tolerance
from picardopt.warn import warn_user

STATE_KEY = "picard"


class ParallelPicardOptimizer(OptimizerFacade):
    """Wraps any torch optimizer and evaluates its future steps ahead of time, on all ranks at once.

    ``step(closure)`` takes exactly one step of the wrapped optimizer and returns that step's loss, like the loop that
    it replaces. Internally it guesses a window of future steps, evaluates them in parallel and keeps them as far as
    the guesses were right to within `tolerance` (DreamPropeller, arXiv 2311.17082, Algorithm 2). With ``tolerance=0``
    every committed number is bitwise the sequential one.

    The closure must be a function of the parameters and the step alone: it takes its data by step (``closure(step)``)
    and draws from the global generators of torch, numpy or random, which are seeded for it from (seed, step).

    Args:
        base: The optimizer to run; stepped in place, with its own code. You may go on using either object. A list of
            optimizers over disjoint parameters is stepped as one.
        window: Steps evaluated per sweep, p; default: the number of Picard ranks.
        tolerance: Which guesses to accept: a number, the largest squared distance per parameter to the refined iterate
            (0 is exact), `DriftTolerance` (the default), `StepRelativeTolerance`, `AdaptiveTolerance` or your own.
        predictor: Makes the first guesses for new slots: "coast" (the base steps on with zero gradients), "hold" (as in
            the paper: copies the last iterate), or an object of your own (`picardopt.predictor.Predictor`).
        total_steps: Steps of the whole run, T, if known: nothing is evaluated beyond it.
        seed: The run's seed; step t draws from a hash of (seed, t).
        lr_scheduler: The scheduler that your loop steps after each step, from which future learning rates are known.
            Without it they are taken as constant over a window. It can be set later.
        mesh: The ranks, a DeviceMesh with the dims "picard" (ranks that evaluate different steps) and "data" (ranks
            that share a step and split its batch by `data_rank`; their gradients are averaged).
        process_group: The ranks that share the window, instead of a mesh: a ProcessGroup or a DeviceMesh of one
            dimension; default: torch.distributed's default group if it is initialized, else this process alone.
        carry: Tensors besides the parameters that a step reads and rewrites in place (BatchNorm's statistics, an
            occupancy grid): a list of tensors, a module (its buffers), or a `Carry` with an update of its own.
        restructure: When and how a step changes the number of parameters (densify, prune).
        measured: The bases whose parameters count in residuals (the scene's, for instance, not its LoRA's); default:
            all. At tolerance 0 every parameter counts.
        secants: Pairs of drifts (gradients) that correct drifts at wrong guesses (`picardopt.correction`); 0: none. A
            pair takes twice the parameters' memory. Default: 8 with a tolerance that reads pairs (`DriftTolerance`).
        nonfinite: What to do about a gradient with a NaN or an infinity: "raise", or "skip" the base's step.
        audit: When to check that the closure is repeatable: "auto" (often at first, then rarely), "always" or "never".
        timeout: Seconds to wait for any rank.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
        UnsupportedOptimizerError: If the base cannot be stepped from dense gradients alone.
        RankMismatchError: If the ranks have different models or options.
    """

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        *,
        window: int | None = None,
        tolerance: float | Tolerance | None = None,
        predictor: str | Predictor = "coast",
        total_steps: int | None = None,
        seed: int = 0,
        lr_scheduler: LRScheduler | None = None,
        mesh: DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        carry: Carry | nn.Module | Sequence[Tensor] | None = None,
        restructure: Restructure | None = None,
        measured: Sequence[Optimizer] | None = None,
        secants: int | None = None,
        nonfinite: str = "raise",
        audit: str = "auto",
        timeout: float = 600.0,
    ) -> None:
        for optimizer in base if isinstance(base, Sequence) else [base]:
            check_base(optimizer)
        check_arguments(window, total_steps, seed, nonfinite, timeout, secants)
        self.base = JoinedOptimizer(base) if isinstance(base, Sequence) else base
        self._carry = as_carry(carry)
        check_carry(self._carry, parameters_of(self.base))
        check_restructure(restructure)
        self._unmeasured = unmeasured_bases(self.base, measured)
        # Makes the hook registries; Optimizer.__init__ would make groups too, which are the base's.
        Optimizer.__setstate__(self, {})
        self._tolerance = as_tolerance(DriftTolerance() if tolerance is None else tolerance)
        self.stats = Stats()
        self._audit = Audit(audit)
        self._grid = make_grid(process_group, mesh)
        device = parameters_of(self.base)[0].device
        self._engine = make_engine(self._grid, device, timeout, self.stats)
        self._stepper = BaseStepper(self.base)
        self._options = Options(
            window=(self._grid.picard.size if self._grid else 1) if window is None else window,
            predictor=as_predictor(predictor),
            total_steps=total_steps,
            seed=seed,
            nonfinite=nonfinite,
            restructure=restructure,
            secants=secants,
        )
        register(self)
        self._step_index = 0
        self._warned_plain = False
        self._speculator: Speculator | None = None
        self.lr_scheduler = lr_scheduler
        speculator = self._ready()
        speculator.evaluator.start(speculator.window, 0)

    def step(self, closure: Closure | None = None) -> Any:
        """Commits one step of the base and returns that step's loss.

        Args:
            closure: Computes the loss of a step and its gradients: zero_grad, forward, backward, return
                the loss. ``closure(step)`` if it has a parameter called `step`, else ``closure()``.
                Without a closure the base steps on the present gradients: nothing runs ahead.

        Returns:
            The closure's loss at this step, detached, the same on every rank (on a data axis the mean over the ranks
            that share the step); None without a closure.

        Raises:
            Exception: The closure's own error at this step, on every rank.
            TypeError: If the closure has a required parameter that is not called `step`.
            NonFiniteGradientError: If this step's gradient is not finite (unless ``nonfinite="skip"``).
            ImpureClosureError: If the closure is not a function of (parameters, step).
            RankMismatchError: If the ranks make different calls.
            RankLostError: If a rank died or did not answer in time.
        """
        given = as_step_closure(closure)
        if isinstance(given, Plain):
            return self._plain_step(closure, given.reason)
        check_mode()
        speculator = self._ready()
        with interrupts_deferred():
            accepted = speculator.next(given, self._step_index)
            with phase(self.stats, "commit"):
                self._commit(speculator, accepted)
        return accepted.drift.returned

    def flush(self) -> None:
        """Drops the queue of steps evaluated ahead; the next step is evaluated anew.

        Call it on every rank after changing what the closure reads but picardopt cannot compare (a file, state in C,
        an attribute deep inside an object); see docs/closures.md. It is cheap.
        """
        if self._speculator is not None:
            self._speculator.forget()

    def _commit(self, speculator: Speculator, accepted: Accepted) -> None:
        """Commits the step: parameters, state, carry, window and counters, all of them or none."""
        change, holders = self._options.change_at(self._step_index, self._carry.tensors)
        try:
            parents = speculator.rollout.commit(accepted.drift, change, holders)
        except BaseException:
            speculator.drop()
            raise
        speculator.advance()
        self._count()
        if change is not None and not self._fits(speculator):
            self._speculator = None
            updates = self._carry.update is not None
            remap_queue(speculator, self._ready(), parents, returned=updates)

    def _plain_step(self, closure: Closure | None, reason: str) -> Any:
        """Takes a step as the base's own ``step(closure)`` does, with nothing evaluated ahead."""
        self.flush()
        # Distributed checkpointing takes a step at rate 0 to create the base's state: no reason to warn.
        if not self._warned_plain and any(float(g.get("lr", 1)) for g in self.param_groups):
            self._warned_plain = True
            warn_user(reason)
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        change, holders = self._options.change_at(self._step_index, self._carry.tensors)
        then = [] if change is None else [change]
        if closure is not None and self._carry.update is not None:
            then.insert(0, partial(run_update, self._carry, returned))
        with interrupts_deferred(), phase(self.stats, "commit"):
            self._stepper.plain_step(self._carry.present(), then, holders)
            self._count()
        return returned

    def _count(self) -> None:
        self._step_index += 1
        self.stats.steps += 1

    def _ready(self) -> Speculator:
        """Returns the speculator of the present parameters; a new one if tensors were added or replaced."""
        if self._speculator is None or not self._fits(self._speculator):
            self.flush()
            parts = (self._stepper, self._carry, self._unmeasured, self._engine)
            self._speculator = make_speculator(
                self, *parts, self._options, self._tolerance, self._audit, self.stats
            )
        return self._speculator

    def _fits(self, speculator: Speculator) -> bool:
        """Returns whether a speculator was made for the present tensors."""
        return speculator.layout.describes(parameters_of(self.base), self._carry.present())

    @property
    def tolerance(self) -> Tolerance:
        """The tolerance. Setting it drops the queue."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, value: float | Tolerance) -> None:
        self._tolerance = as_tolerance(value)
        self._forget()

    def __repr__(self) -> str:
        return (
            f"ParallelPicardOptimizer(window={self.window}, tolerance={self.tolerance!r}, "
            f"ranks={self._engine.size}, seed={self.seed})\n{self.base!r}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the base's state dict and, under one more key, step, seed and tolerance; nothing of the window."""
        state = self.base.state_dict()
        state[STATE_KEY] = saved_state(self._step_index, self.seed, self.tolerance, self.base)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the base, and drops the queue.

        Args:
            state_dict: From `state_dict` (any window, any number of ranks), with the step, the seed and the
                tolerance; or from the base's own `state_dict`: then set `step_index` as well.

        Raises:
            CheckpointError: If it does not fit the base's groups or shapes; nothing is changed then.
        """
        base_state = {k: v for k, v in state_dict.items() if k != STATE_KEY}
        loaded = load_state(self.base, self.tolerance, base_state, state_dict.get(STATE_KEY))
        if loaded is not None:
            self._step_index, seed = loaded
            self._options = replace(self._options, seed=seed)
        self._forget()

    def _forget(self) -> None:
        """Drops the queue and all guesses."""
        self.flush()
        self._speculator = None

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled and speculation need not be; `step` is a scheduler's patch of the method.
        omitted = ("_grid", "_engine", "_stepper", "_speculator", "step")
        state = {key: value for key, value in self.__dict__.items() if key not in omitted}
        return {**state, "_lr_scheduler": self.lr_scheduler, "_had_ranks": self._engine.size > 1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        lr_scheduler, had_ranks = state.pop("_lr_scheduler"), state.pop("_had_ranks")
        self.__dict__.update(state)
        Optimizer.__setstate__(self, {})
        self._grid = None
        self._engine = make_engine(None, parameters_of(self.base)[0].device, 0, self.stats)
        self._stepper = BaseStepper(self.base)
        self._speculator = None
        register(self)
        self.lr_scheduler = lr_scheduler
        if had_ranks:
            warn_user(
                "a copied or unpickled ParallelPicardOptimizer has no process group: it evaluates its window in "
                "this process alone"
            )
