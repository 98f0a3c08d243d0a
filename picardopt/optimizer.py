"""`ParallelPicardOptimizer`: the torch.optim contract around a `Speculator`, and the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt.audit import Audit
from picardopt.bases import JoinedOptimizer, unmeasured_bases
from picardopt.carry import Carry, as_carry
from picardopt.checkpoint import load_state, saved_state
from picardopt.checks import check_arguments, check_base, check_lr_scheduler
from picardopt.drift import Closure, map_tensors
from picardopt.engines import DistributedEngine, Engine, SerialEngine
from picardopt.facade import OptimizerFacade
from picardopt.frameworks import warn_user, why_plain
from picardopt.interrupts import interrupts_deferred
from picardopt.layout import ParameterLayout, parameters_of
from picardopt.mesh import make_grid
from picardopt.options import Options
from picardopt.predictor import PREDICTORS
from picardopt.restructure import Restructure, check_restructure
from picardopt.rollout import Rollout
from picardopt.speculator import Accepted, Speculator
from picardopt.stats import Stats
from picardopt.tolerance import StepRelativeTolerance, Tolerance, as_tolerance

STATE_KEY = "picard"


class ParallelPicardOptimizer(OptimizerFacade):
    """Wraps any torch optimizer and evaluates future steps ahead of time, on all ranks at once.

    ``step(closure)`` takes exactly one step of the wrapped optimizer and returns that step's loss, like the
    loop that it replaces. Behind it a window of future steps is guessed, evaluated in parallel and kept
    as far as the guesses were right to within `tolerance` (DreamPropeller, arXiv 2311.17082, Algorithm 2).
    With ``tolerance=0`` every committed number is bitwise the sequential one.

    The closure must be a function of the parameters and the step alone: it takes its data by step
    (``closure(step)``, handed over if it has a required parameter of that name) and draws from torch's, numpy's or
    random's global generators, which are seeded for it from (seed, step).

    Args:
        base: The optimizer to run; stepped in place, with its own code. Keep using either object. Several
            optimizers over disjoint parameters, in a list, are stepped as one.
        window: Steps evaluated per sweep, p; default: the number of Picard ranks.
        tolerance: Largest accepted squared distance per parameter between a guess and what it should have
            been: a number (0 is exact), `StepRelativeTolerance` or `AdaptiveTolerance` (the paper's).
        predictor: What fills the window's new slots: "coast" (the base steps on with zero gradients) or
            "hold" (the paper: copies the last iterate).
        total_steps: Steps of the whole run, T, if known: nothing is evaluated beyond it.
        seed: The run's seed; step t draws from a hash of (seed, t).
        lr_scheduler: The scheduler that your loop steps after each step, so that running ahead knows future
            learning rates; without it they are taken as constant over a window. Settable later.
        mesh: The ranks, a DeviceMesh with the dims "picard" (ranks that evaluate different steps) and "data" (ranks
            that share a step and split its batch by `data_rank`; their gradients are averaged).
        process_group: Instead of a mesh the ranks that share the window, a ProcessGroup or a one-dimensional
            DeviceMesh; default: torch.distributed's default group if it is initialised, else this process alone.
        carry: Tensors besides the parameters that a step reads and rewrites (BatchNorm's statistics, an
            occupancy grid, a teacher's average), written in place by the closure: a list of tensors, or a
            module, whose buffers are meant; or a `Carry` with an update of its own.
        restructure: When and how a step changes the number of parameters (densify, prune).
        measured: Of several bases those whose parameters count in residuals (the scene's, not its LoRA's);
            default: all. At tolerance 0 every parameter counts.
        nonfinite: At a gradient with NaN or infinity: "raise", or "skip" the base's step.
        audit: Whether the closure is checked to be pure: "auto" (often at first, then rarely), "always", "never".
        timeout: Seconds that any rank is waited for.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
        UnsupportedOptimizerError: If the base cannot be stepped from dense gradients alone.
        RankMismatchError: If the ranks were given different models or options.
    """

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        *,
        window: int | None = None,
        tolerance: float | Tolerance | None = None,
        predictor: str = "coast",
        total_steps: int | None = None,
        seed: int = 0,
        lr_scheduler: LRScheduler | None = None,
        mesh: DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        carry: Carry | nn.Module | Sequence[Tensor] | None = None,
        restructure: Restructure | None = None,
        measured: Sequence[Optimizer] | None = None,
        nonfinite: str = "raise",
        audit: str = "auto",
        timeout: float = 600.0,
    ) -> None:
        for optimizer in base if isinstance(base, Sequence) else [base]:
            check_base(optimizer)
        check_arguments(window, predictor, total_steps, seed, nonfinite, timeout)
        self.base = JoinedOptimizer(base) if isinstance(base, Sequence) else base
        self._carry = as_carry(carry)
        self._carry.check(parameters_of(self.base))
        check_restructure(restructure)
        self._unmeasured = unmeasured_bases(self.base, measured)
        # Hook registries and zero_grad's profile name, without Optimizer.__init__: the groups are the base's.
        Optimizer.__setstate__(self, {})
        self._tolerance = as_tolerance(StepRelativeTolerance() if tolerance is None else tolerance)
        self.stats = Stats()
        self._audit = Audit(audit)
        self._grid = make_grid(process_group, mesh)
        self._timeout = timeout
        self._engine = self._make_engine()
        self._rollout = Rollout(self.base, self)
        self._options = Options(
            window=(self._grid.picard.size if self._grid else 1) if window is None else window,
            predictor=PREDICTORS[predictor],
            total_steps=total_steps,
            seed=seed,
            nonfinite=nonfinite,
            restructure=restructure,
        )
        self._step_index = 0
        self._told_plain = False
        self._speculator: Speculator | None = None
        self.lr_scheduler = lr_scheduler
        self._ready().start(0)

    # -- the step ---------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """Commits one step of the base and returns that step's loss.

        Args:
            closure: Computes the loss of a step and its gradients: zero_grad, forward, backward, return
                the loss. ``closure(step)`` if it has a required parameter called `step`, else ``closure()``.
                Without a closure the base steps on the present gradients: nothing runs ahead.

        Returns:
            The closure's loss at this step, detached, the same on every rank: on a data axis its floating numbers
            and tensors are means over the ranks that share the step. None without a closure.

        Raises:
            Exception: What the closure raised at this step, on every rank.
            NonFiniteGradientError: If this step's gradient is not finite (unless ``nonfinite="skip"``).
            ImpureClosureError: If the closure is found not to be a function of (parameters, step).
            RankMismatchError: If the ranks do different things.
            RankLostError: If a rank died or did not answer in time.
        """
        why = why_plain(closure)
        if closure is None or why:
            return self._plain_step(closure, why)
        speculator = self._ready()
        with interrupts_deferred():
            accepted = speculator.next(closure, self._step_index)
            with self.stats.phase("commit"):
                self._commit(speculator, accepted)
        return accepted.drift.loss

    def _commit(self, speculator: Speculator, accepted: Accepted) -> None:
        parameters, drift, step = speculator.layout.parameters, accepted.drift, self._step_index
        try:
            with self._rollout.committing():
                self._rollout.take(parameters, drift)
                speculator.settle()
                speculator.pop()
                self._step_index += 1
                self.stats.steps += 1
                self._restructure(speculator, step)
        except BaseException:
            speculator.drop()
            raise

    def _restructure(self, speculator: Speculator | None, step: int) -> None:
        """Lets the user change the number of parameters after a step that is due; None forgets all guesses."""
        restructure = self._options.restructure
        if restructure is None or not restructure.due(step):
            return
        self._speculator = None  # should what follows raise, the window is rebuilt
        parents = restructure.function(step)
        if speculator is None or self._fits(speculator):
            self._speculator = speculator
        else:
            self._ready().inherit(speculator, parents)

    def _plain_step(self, closure: Closure | None, why: str) -> Any:
        """What the base's own ``step(closure)`` does, under the caller's generators."""
        # At rate 0 it only makes the base's state: distributed checkpointing does that before it loads.
        if not self._told_plain and any(float(g.get("lr", 1)) for g in self.param_groups):
            self._told_plain = True
            warn_user(why)
        if self._speculator is not None:
            self._speculator.drop()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with interrupts_deferred(), self.stats.phase("commit"):
            self._rollout.plain_step()
            if closure is not None and self._carry.update is not None:
                self._carry.update(map_tensors(Tensor.detach, loss))
            self._step_index += 1
            self.stats.steps += 1
            self._restructure(None, self._step_index - 1)
        return loss

    def _ready(self) -> Speculator:
        """The speculator over the present parameters; a new one if tensors were added or replaced."""
        if self._speculator is not None and self._fits(self._speculator):
            return self._speculator
        if self._speculator is not None:
            self._speculator.drop()
        unmeasured = [p for base in self._unmeasured for p in parameters_of(base)]
        self._speculator = Speculator(
            ParameterLayout(parameters_of(self.base), self._carry.present(), unmeasured),
            self._carry,
            self._engine,
            self._rollout,
            self._tolerance,
            self._audit,
            self._options,
            self.stats,
        )
        return self._speculator

    def _fits(self, speculator: Speculator) -> bool:
        """Whether a speculator is over the present tensors."""
        return speculator.layout.describes(parameters_of(self.base), self._carry.present())

    def _make_engine(self) -> Engine:
        if self._grid is None:
            return SerialEngine(self.stats)
        device = parameters_of(self.base)[0].device
        return DistributedEngine(self._grid, device, self._timeout, self.stats)

    @property
    def _speculates(self) -> bool:
        return self.window > 1 or self._engine.size > 1

    # -- what tells about the run -----------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Steps evaluated per sweep, the paper's p."""
        return self._options.window

    @property
    def data_rank(self) -> int:
        """Which part of a step's batch this process evaluates, 0 .. data_size - 1."""
        return self._grid.data.place if self._grid else 0

    @property
    def data_size(self) -> int:
        """Into how many equal parts each step's batch is split; more than 1 only with a mesh."""
        return self._grid.data.size if self._grid else 1

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, the paper's T, if they were given."""
        return self._options.total_steps

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._options.seed

    @property
    def tolerance(self) -> Tolerance:
        """What is accepted. Setting it drops what was evaluated ahead under the old one."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, value: float | Tolerance) -> None:
        self._tolerance = as_tolerance(value)
        self._flush()

    @property
    def step_index(self) -> int:
        """Index of the next step: how many were committed. Setting it drops what was evaluated ahead."""
        return self._step_index

    @step_index.setter
    def step_index(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"step_index={value!r}: give the number of committed steps, an integer >= 0"
            )
        self._flush()
        self._step_index = value

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The scheduler that tells future learning rates; your loop still steps it."""
        return self._rollout.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, value: LRScheduler | None) -> None:
        check_lr_scheduler(value)
        self._rollout.watch(value)

    def __repr__(self) -> str:
        return (
            f"ParallelPicardOptimizer(window={self.window}, tolerance={self.tolerance!r}, "
            f"ranks={self._engine.size}, seed={self.seed})\n{self.base!r}"
        )

    # -- state, copies ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict and, under one more key, the step, the seed and the tolerance.

        Speculation is disposable: nothing of the window is in it.
        """
        state = self.base.state_dict()
        state[STATE_KEY] = saved_state(self._step_index, self.seed, self.tolerance, self.base)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the base; what was evaluated ahead is dropped.

        Args:
            state_dict: From `state_dict` (any window, any number of ranks): the step, the seed and the
                tolerance go on from there; or from the base's own: then set `step_index`.

        Raises:
            CheckpointError: If it does not fit the base's groups or shapes; nothing was changed.
        """
        base_state = {k: v for k, v in state_dict.items() if k != STATE_KEY}
        loaded = load_state(self.base, self.tolerance, base_state, state_dict.get(STATE_KEY))
        if loaded is not None:
            self._step_index, seed = loaded
            self._options = replace(self._options, seed=seed)
        self._flush()

    def _flush(self) -> None:
        if self._speculator is not None:
            self._speculator.drop()
        self._speculator = None

    def __getstate__(self) -> dict[str, Any]:
        # The process group cannot travel, speculation need not; `step` is what a scheduler patched.
        left = ("_grid", "_engine", "_rollout", "_speculator", "step")
        state = {key: value for key, value in self.__dict__.items() if key not in left}
        return {**state, "_lr_scheduler": self.lr_scheduler, "_had_ranks": self._engine.size > 1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        lr_scheduler, had_ranks = state.pop("_lr_scheduler"), state.pop("_had_ranks")
        self.__dict__.update(state)
        Optimizer.__setstate__(self, {})
        self._grid = None
        self._engine = self._make_engine()
        self._rollout = Rollout(self.base, self)
        self._speculator = None
        self.lr_scheduler = lr_scheduler
        if had_ranks:
            warn_user(
                "a copied or unpickled ParallelPicardOptimizer has no process group: it evaluates its window in "
                "this process alone"
            )
