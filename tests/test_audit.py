"""Law 8: an impure closure is found out, and a pure one never is."""

import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, step_rng
from tests.helpers.runs import Case, assert_parallel, parallel, quiet

STEPS = 60
"""Longer than the first sweeps of every window here: "by default" is soon enough to be of use."""


class Setup:
    """A small regression whose closure each misuse spoils in its own way."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        base = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.optimizer = ParallelPicardOptimizer(base, **{"window": 4, "seed": 1, **options})
        self.data = torch.randn(STEPS * 8, 5, 6)

    def loss(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(batch[:, :4]) - batch[:, 4:]).square().mean()
        loss.backward()
        return loss


def late_bound_batch(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """The commonest misuse: the batch is taken outside, one a call."""
    for batch in setup.data:
        yield lambda batch=batch: setup.loss(batch)


def late_bound_variable(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """The same through a variable that one closure reads late."""
    holder: dict[str, Tensor] = {}

    def closure() -> Tensor:
        return setup.loss(holder["batch"])

    for batch in setup.data:
        holder["batch"] = batch
        yield closure


def deep_batch(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """The same, deeper inside an object than what is compared at every step."""
    holder = types.SimpleNamespace(trainer=Hidden(Hidden(None)))

    def closure() -> Tensor:
        return setup.loss(holder.trainer.inside.inside)

    for batch in setup.data:
        holder.trainer.inside.inside = batch
        yield closure


class Hidden:
    """An object with something inside."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def iterator(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """``next(it)`` inside the closure: a speculative evaluation uses up a batch."""
    batches = iter(setup.data)
    return itertools.repeat(lambda: setup.loss(next(batches)))


def loader(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """A DataLoader's iterator, re-made at its end as training scripts do."""
    batches = itertools.cycle(torch.utils.data.DataLoader(setup.data[:, 0], batch_size=4))
    return itertools.repeat(lambda: setup.loss(next(batches)))


def torch_generator(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return itertools.repeat(lambda: setup.loss(torch.randn(5, 6, generator=generator)))


def numpy_generator(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    generator = np.random.default_rng(0)
    return itertools.repeat(
        lambda: setup.loss(torch.as_tensor(generator.standard_normal((5, 6)), dtype=torch.float32))
    )


counter = 0


def global_counter(setup: Setup) -> Iterator[Callable[..., Tensor]]:
    """A schedule that counts evaluations instead of steps."""

    def closure() -> Tensor:
        global counter
        counter += 1
        return setup.loss(torch.randn(5, 6) * (1 + counter))

    return itertools.repeat(closure)


SEEN = [late_bound_batch, late_bound_variable]
"""Legal: the loop changes what the closure sees. Right at any tolerance; only nothing runs ahead."""
MISUSES = [
    deep_batch,
    iterator,
    loader,
    torch_generator,
    numpy_generator,
    global_counter,
]


def train(setup: Setup, closures: Iterator[Callable[..., Tensor]], steps: int = STEPS) -> None:
    for closure in itertools.islice(closures, steps):
        setup.optimizer.step(closure)


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("tolerance", [None, 0, float("inf")])
@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_misuse_is_found_by_default(misuse: Any, tolerance: Any, window: int) -> None:
    setup = Setup(window=window, tolerance=tolerance)
    if tolerance == 0 and misuse is deep_batch:
        # Smooth drifts: nothing is ever accepted ahead, so the run is sequential and right.
        train(setup, misuse(setup))
        assert max(setup.optimizer.stats.strides) == 1
        return
    with pytest.raises(ImpureClosureError) as caught:
        train(setup, misuse(setup))
    message = str(caught.value)
    assert "closure(step)" in message  # the remedy, in three lines
    assert message.count("\n") >= 3
    # Nothing that came of it was committed: the object stands at the last committed step.
    assert setup.optimizer.step_index == setup.optimizer.stats.steps < STEPS
    assert all(bool(p.isfinite().all()) for p in setup.model.parameters())
    pure = itertools.repeat(lambda: setup.loss(torch.randn(5, 6)))
    before = setup.optimizer.step_index
    train(setup, pure, 10)
    assert setup.optimizer.step_index == before + 10


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("tolerance", [None, 0, float("inf")])
@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_a_batch_that_the_loop_hands_over_is_seen(change: Any, tolerance: Any, window: int) -> None:
    """Every step sees its own batch, as in the plain loop; the first drop names what changed."""
    setup = Setup(window=window, tolerance=tolerance)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(setup, change(setup))
    stats = setup.optimizer.stats
    plain = Setup()
    for step, closure in enumerate(itertools.islice(change(plain), STEPS)):
        with step_rng(1, step):
            closure()
            plain.optimizer.base.step()
    for a, b in zip(setup.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert stats.steps == STEPS
    if tolerance != 0:
        # The default accepts less where drifts change with what the loop hands over.
        assert stats.outer_changes >= (1 if tolerance is None else 8)
        # Once it is known that each window is dropped behind its head, the head alone is evaluated.
        assert stats.drift_evaluations <= 2 * STEPS + 8 * window
        assert any("batch" in str(warning.message) for warning in caught)


def test_short_strides_do_not_use_up_the_checks() -> None:
    """While nothing is accepted ahead, a batch from outside does no harm; once something is, it is found."""
    setup = Setup(tolerance=0)
    closures = deep_batch(setup)
    for _ in range(10):
        setup.optimizer.step(next(closures))
    assert max(setup.optimizer.stats.strides) == 1
    assert setup.optimizer.stats.audits >= 2
    setup.optimizer.tolerance = 1e3
    with pytest.raises(ImpureClosureError, match="not a function of"):
        for _ in range(2):  # the second step is the first that was evaluated ahead
            setup.optimizer.step(next(closures))


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_never_means_never(misuse: Any) -> None:
    setup = Setup(audit="never", tolerance=float("inf"))
    train(setup, misuse(setup), 20)
    assert setup.optimizer.stats.steps == 20
    assert setup.optimizer.stats.seconds["audit"] == 0


@pytest.mark.parametrize("tolerance", [None, 0])
def test_batchnorm_raises_by_name(tolerance: Any) -> None:
    """Undeclared buffers: the running statistics would see every guess."""
    setup = Setup(tolerance=tolerance)
    norm = nn.BatchNorm1d(4)
    before = norm.running_mean.clone()  # type: ignore[union-attr]

    def closure() -> Tensor:
        x = torch.randn(5, 6)
        return setup.loss(torch.cat([norm(x[:, :4]).detach(), x[:, 4:]], 1))

    with pytest.raises(ImpureClosureError, match="running_mean"):
        train(setup, itertools.repeat(closure))
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
    norm.eval()
    train(setup, itertools.repeat(closure), 10)


def test_batchnorm_inside_a_model_is_found_from_the_start() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), window=3, tolerance=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(6, 3)).square().mean()
        loss.backward()
        return loss

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ImpureClosureError, match="running_var"):
        optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.step_index == 0


def test_a_hand_written_buffer_raises_by_name() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("average", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.average.lerp_(x.mean(0), 0.1)
            return (self.weight * x).sum()

    module = Counting()
    optimizer = ParallelPicardOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), window=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(torch.randn(6, 3))
        loss.backward()
        return loss

    with pytest.raises(ImpureClosureError, match="average"):
        optimizer.step(closure)


def test_a_closure_that_moves_the_parameters_raises() -> None:
    setup = Setup()

    def closure() -> Tensor:
        loss = setup.loss(torch.randn(5, 6))
        with torch.no_grad():
            next(setup.model.parameters()).mul_(0.9)
        return loss

    with pytest.raises(ImpureClosureError, match="parameter"):
        train(setup, itertools.repeat(closure))


@pytest.mark.parametrize("how", ["rate", "scheduler"])
@pytest.mark.parametrize("tolerance", [None, 0])
def test_a_closure_that_changes_the_optimizer_raises(tolerance: Any, how: str) -> None:
    """A warm-up inside the closure: the rate of the last slot would step the head."""
    setup = Setup(tolerance=tolerance)
    base = setup.optimizer.base
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    base.step()  # or the scheduler warns about the order of calls

    def closure(step: int) -> Tensor:
        if how == "rate":
            for group in setup.optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step)
        else:
            scheduler.step()
        return setup.loss(torch.randn(5, 6))

    before = [p.detach().clone() for p in setup.model.parameters()]
    with pytest.raises(ImpureClosureError, match="lr"):
        setup.optimizer.step(closure)
    assert setup.optimizer.step_index == 0
    assert setup.optimizer.param_groups[0]["lr"] == 1e-2
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


PURE: dict[str, Callable[[Setup], Callable[[int], Tensor]]] = {
    "by step": lambda setup: lambda step: setup.loss(setup.data[step]),
    "global draws": lambda setup: (
        lambda step: setup.loss(torch.randn(5, 6) + float(np.random.rand()))
    ),
    "own generator seeded by step": lambda setup: (
        lambda step: setup.loss(torch.randn(5, 6, generator=torch.Generator().manual_seed(step)))
    ),
    "dropout": lambda setup: (
        lambda step: setup.loss(nn.functional.dropout(setup.data[step], 0.5, training=True))
    ),
    "schedule by step": lambda setup: lambda step: setup.loss(setup.data[step] * (1 + step)),
    "eval batchnorm": lambda setup: (
        lambda step: setup.loss(nn.BatchNorm1d(5).eval()(setup.data[step][None])[0])
    ),
}


@pytest.mark.parametrize("audit", ["auto", "always"])
@pytest.mark.parametrize("tolerance", [None, 0, float("inf")])
@pytest.mark.parametrize("name", PURE)
def test_pure_closures_never_raise(name: str, tolerance: Any, audit: Any) -> None:
    setup = Setup(tolerance=tolerance, audit=audit)
    train(setup, itertools.repeat(PURE[name](setup)), 40)
    assert setup.optimizer.stats.steps == 40
    assert setup.optimizer.stats.seconds["audit"] > 0


@pytest.mark.parametrize("optimizer", ["Adam", "SGD: nesterov", "Langevin"])
@pytest.mark.parametrize("problem", ["network", "partial", "clipping", "bf16"])
def test_the_audit_disturbs_nothing(problem: str, optimizer: str) -> None:
    """Always on, it changes no bit of the run, and no counter but its own."""
    case = Case(problem, optimizer)
    with quiet():
        on = parallel(case, window=4, audit="always")
        off = parallel(case, window=4, audit="never")
    assert_parallel(on)
    assert on.stats["strides"] == off.stats["strides"]
    assert on.stats["drift_evaluations"] == off.stats["drift_evaluations"]
    for a, b in zip(on.parameters[-1], off.parameters[-1], strict=True):
        assert torch.equal(a, b)
