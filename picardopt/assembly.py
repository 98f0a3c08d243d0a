"""Builds the speculator; needed again whenever parameters are added or replaced."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from picardopt.audit import Audit
from picardopt.auditor import Auditor
from picardopt.bases import JoinedOptimizer
from picardopt.carry import Carry
from picardopt.correction import SECANTS, Secants
from picardopt.engines import Engine
from picardopt.evaluation import Evaluator
from picardopt.gauge import Gauge
from picardopt.layout import ParameterLayout, parameters_of
from picardopt.lending import Lending
from picardopt.options import Options
from picardopt.rollouts import Rollout
from picardopt.speculator import Speculator
from picardopt.stats import Stats
from picardopt.stepper import BaseStepper
from picardopt.tolerance import Tolerance
from picardopt.window import Window


def make_speculator(
    owner: object,
    stepper: BaseStepper,
    carry: Carry,
    unmeasured: Sequence[Optimizer],
    engine: Engine,
    options: Options,
    tolerance: Tolerance,
    audit: Audit,
    stats: Stats,
) -> Speculator:
    """Returns a speculator for the base's present parameters.

    Args:
        owner: The wrapper; only its id is kept.
        stepper: Steps the base.
        carry: The tensors besides parameters that steps rewrite.
        unmeasured: Bases whose parameters do not count in residuals.
        engine: Spreads evaluations over the ranks.
        options: The run's options.
        tolerance: Decides what is accepted.
        audit: The schedule of checks.
        stats: Counters and records.
    """
    base = stepper.base
    left_out = [parameter for other in unmeasured for parameter in parameters_of(other)]
    sizes = [len(group["params"]) for group in base.param_groups]
    layout = ParameterLayout(parameters_of(base), carry.present(), left_out, sizes)
    window = Window(layout)
    ahead = options.window > 1 and not tolerance.exact and sum(layout.numels) > 0
    gauge = Gauge(layout) if ahead else None
    pairs = SECANTS * tolerance.needs_pairs if options.secants is None else options.secants
    correction = Secants(layout, pairs) if ahead and pairs else None
    evaluator = Evaluator(layout, carry, base, id(owner), engine, options, tolerance, audit, stats)
    rollout = Rollout(
        stepper, layout, carry, options.predictor, window, Lending(base, layout), correction
    )
    if engine.size == 1 and options.restructure is None:  # ranks may differ in hooks
        evaluator.keeps_rng = rollout.draws
    bases = [base, *base.optimizers] if isinstance(base, JoinedOptimizer) else [base]
    own = [owner, *bases, *base.param_groups]
    auditor = Auditor(
        layout, window, evaluator, engine, audit, options, stats, tolerance.exact, correction, own
    )
    return Speculator(
        layout, window, engine, evaluator, rollout, gauge, auditor, tolerance, options, stats
    )
