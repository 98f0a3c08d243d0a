"""Small runs of the core, through its public face alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from picardopt import (
    AdaptiveTolerance,
    Carry,
    FixedTolerance,
    ParallelPicardOptimizer,
)
from tests.golden.results import result
from tests.helpers.problems import PROBLEMS, draw, quantize
from tests.helpers.runs import make_closure, quiet
from tests.helpers.splats import build

STEPS = 24


@dataclass
class Setting:
    """What a run is made of.

    Attributes:
        bases: The optimizers; one is wrapped alone, several as one.
        closure: The loss of a step and its gradients.
        carry: Tensors besides parameters, to be hashed with them.
        options: For the wrapper.
        scheduler: Made on the first base and given to the wrapper.
    """

    bases: list[torch.optim.Optimizer]
    closure: Callable[[int], Any]
    carry: Callable[[], list[Tensor]] = list
    options: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None


@dataclass(frozen=True)
class Run:
    """A run by name: how it is set up, on how many processes."""

    set_up: Callable[[], Setting]
    processes: int = 1


def _plain(
    problem: str,
    base: Callable[[list[Any]], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    **options: Any,
) -> Callable[[], Setting]:
    """One optimizer over one of the tests' problems."""

    def set_up() -> Setting:
        made = PROBLEMS[problem]()
        optimizer = base(made.groups)
        schedule = scheduler(optimizer) if scheduler else None
        closure = make_closure(made, optimizer.zero_grad)
        return Setting([optimizer], closure, options=options, scheduler=schedule)

    return set_up


class Normed(nn.Module):
    """A network whose BatchNorm statistics every step rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = draw((4, 3), 1), draw((2, 4), 3)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.norm(x @ quantize(self.first).T))
        return hidden @ quantize(self.second).T


def _carry_by_increments(**options: Any) -> Callable[[], Setting]:
    def set_up() -> Setting:
        model = Normed()
        base = torch.optim.Adam(model.parameters(), lr=1e-3)

        def closure(step: int) -> Tensor:
            base.zero_grad()
            loss: Tensor = (model(torch.randn(6, 3)) - torch.randn(6, 2)).square().mean()
            loss.backward()
            return loss

        return Setting([base], closure, lambda: list(model.buffers()), {"carry": model, **options})

    return set_up


def _carry_with_update(**options: Any) -> Callable[[], Setting]:
    """A running maximum that decays, like an occupancy grid's densities."""

    def set_up() -> Setting:
        weight, grid = draw((4, 3), 1), torch.zeros(4)
        base = torch.optim.Adam([weight], lr=1e-2)

        def closure(step: int) -> dict[str, Tensor]:
            base.zero_grad()
            values = torch.randn(5, 3) @ quantize(weight).T
            loss = (values - torch.randn(5, 4) + 0.1 * quantize(grid)).square().mean()
            loss.backward()
            return {"loss": loss, "seen": values.abs().amax(0)}

        def update(returned: dict[str, Tensor]) -> None:
            grid.copy_(torch.maximum(0.9 * grid, returned["seen"]))

        return Setting([base], closure, lambda: [grid], {"carry": Carry([grid], update), **options})

    return set_up


def _restructure(across: bool, **options: Any) -> Callable[[], Setting]:
    def set_up() -> Setting:
        splats, optimizers, restructure = build(across=across)
        given = {"restructure": restructure, "carry": splats, **options}
        return Setting(
            list(optimizers.values()), splats.closure, lambda: list(splats.buffers()), given
        )

    return set_up


def _not_finite(**options: Any) -> Callable[[], Setting]:
    """Every seventh step's gradient is NaN, and its step is skipped."""

    def set_up() -> Setting:
        weight = draw((4, 3), 1)
        base = torch.optim.Adam([weight], lr=1e-3)

        def closure(step: int) -> Tensor:
            base.zero_grad()
            scale = float("nan") if step % 7 == 3 else 1.0
            loss = (quantize(weight) * torch.randn(4, 3)).sum()
            (loss * scale).backward()
            return loss

        return Setting([base], closure, options={"nonfinite": "skip", **options})

    return set_up


def _joined(**options: Any) -> Callable[[], Setting]:
    """Two networks, of which only the first counts in residuals."""

    def set_up() -> Setting:
        one, other = draw((4, 3), 1), draw((2, 4), 3)
        bases = [torch.optim.Adam([one], lr=1e-3), torch.optim.SGD([other], lr=1e-2, momentum=0.9)]

        def closure(step: int) -> Tensor:
            for base in bases:
                base.zero_grad()
            hidden = torch.tanh(torch.randn(6, 3) @ one.T)
            loss = (hidden @ other.T - torch.randn(6, 2)).square().mean()
            loss.backward()
            return loss

        return Setting(bases, closure, options={"measured": bases[:1], **options})

    return set_up


def _sgd(groups: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=2e-3, momentum=0.9)


def _adam(groups: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1e-3)


def _one_cycle(base: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(base, max_lr=4e-3, total_steps=STEPS + 1)


RUNS = {
    "sgd, exact, hold": Run(_plain("network", _sgd, window=4, tolerance=0, predictor="hold")),
    "adam, exact, coast": Run(_plain("network", _adam, window=8, tolerance=0)),
    "adamw foreach, default": Run(
        _plain("smooth", lambda g: torch.optim.AdamW(g, lr=1e-3, foreach=True), window=4)
    ),
    "rmsprop, fixed, hold": Run(
        _plain(
            "smooth",
            lambda g: torch.optim.RMSprop(g, lr=1e-3, momentum=0.5),
            window=5,
            tolerance=FixedTolerance(2e-5),
            predictor="hold",
        )
    ),
    "adagrad, adaptive": Run(
        _plain(
            "smooth",
            lambda g: torch.optim.Adagrad(g, lr=1e-2),
            window=6,
            tolerance=AdaptiveTolerance(1e-6, decay=0.8),
        )
    ),
    "adam, adaptive from zero": Run(
        _plain("smooth", _adam, window=4, tolerance=AdaptiveTolerance(0.0), total_steps=STEPS)
    ),
    "adam, known schedule": Run(_plain("smooth", _adam, _one_cycle, window=6)),
    "adam amsgrad, bfloat16": Run(
        _plain("bf16", lambda g: torch.optim.Adam(g, lr=1e-3, amsgrad=True), window=5, tolerance=0)
    ),
    "adadelta, float64": Run(  # whose residuals show in which order they were summed
        _plain(
            "float64",
            lambda g: torch.optim.Adadelta(g, lr=0.1),
            window=5,
            tolerance=FixedTolerance(1e-4),
        )
    ),
    "adam, default, two processes": Run(_plain("smooth", _adam, window=5), 2),
    "sgd, exact, three processes": Run(_plain("network", _sgd, tolerance=0), 3),
    "carry by increments, exact": Run(_carry_by_increments(window=4, tolerance=0)),
    "carry by increments, default": Run(_carry_by_increments(window=4)),
    "carry by increments, two processes": Run(_carry_by_increments(window=4), 2),
    "carry with an update": Run(_carry_with_update(window=4, tolerance=0)),
    "restructure ends windows": Run(_restructure(False, window=7, tolerance=1e-5)),
    "restructure across windows": Run(_restructure(True, window=7, tolerance=1e-5)),
    "not finite, skipped": Run(_not_finite(window=4, tolerance=0)),
    "joined, one measured": Run(_joined(window=4, tolerance=FixedTolerance(2e-6))),
}


def run(name: str) -> dict[str, Any]:
    """Makes one run on this process, or on this rank of it."""
    setting = RUNS[name].set_up()
    bases = setting.bases
    base = bases if len(bases) > 1 else bases[0]
    with quiet():
        optimizer = ParallelPicardOptimizer(
            base,
            **{"seed": 3, **setting.options},
            **({"lr_scheduler": setting.scheduler} if setting.scheduler else {}),
        )
        losses = []
        for _ in range(STEPS):
            returned = optimizer.step(setting.closure)
            losses.append(float(returned["loss"] if isinstance(returned, dict) else returned))
            if setting.scheduler:
                setting.scheduler.step()
    stats = optimizer.stats
    assert stats.steps == STEPS
    return result(
        parameters=[p for base in bases for group in base.param_groups for p in group["params"]],
        state=[
            [base.state_dict()["state"], [float(group["lr"]) for group in base.param_groups]]
            for base in bases
        ],
        losses=losses,
        carry=setting.carry(),
        strides=stats.strides,
        measures=[stats.residuals, stats.tolerances],
        evaluations=stats.drift_evaluations,
        wasted=stats.wasted_evaluations,
    )
