"""Changes between two steps that matter drop the queue and are said; counters, logs and the like do neither."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, PicardWarning, step_rng
from tests.helpers.loops import Net, error


class Smooth:
    """A regression with smooth gradients, at the default tolerance."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        base = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.optimizer = ParallelPicardOptimizer(base, window=8, **options)

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        x = torch.randn(16, 4)
        return (self.model(x) - x[:, :2].sin()).square().mean()


class Bar:
    """A progress bar, or what it comes to."""

    def __init__(self) -> None:
        self.n, self.text = 0, ""

    def update(self) -> None:
        self.n += 1
        self.text = f"{self.n} steps"


@pytest.mark.parametrize("tolerance", [None, 0])
def test_counters_logs_and_bars_do_not_stop_running_ahead_unless_exact(tolerance: Any) -> None:
    case = Smooth(tolerance=tolerance)
    count, log, bar = 0, [0.0], Bar()

    def closure(step: int) -> Tensor:
        loss = case.loss()
        loss.backward()
        assert count >= 0 and log is not None and bar is not None  # noqa: PT018
        return loss

    said = pytest.warns(PicardWarning, match="count") if tolerance == 0 else nullcontext()
    case.optimizer.tolerance = 1e9 if tolerance is None else 0
    with said:
        for _ in range(80):
            log.append(float(case.optimizer.step(closure)))
            count += 1
            bar.update()
    stats = case.optimizer.stats
    if tolerance is None:
        assert stats.outer_changes == 0
        assert stats.sweeps == 10
    else:
        assert stats.sweeps == 80


def test_a_weight_that_matters_drops_the_queue_and_is_said_once() -> None:
    case = Smooth(tolerance=1e9)
    weight, count = 1.0, 0

    def closure(step: int) -> Tensor:
        loss = weight * case.loss() + 0 * count
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(100):
            if step in (20, 63):
                weight *= 0.5
            case.optimizer.step(closure)
            count += 1
    assert [each.category for each in caught] == [PicardWarning]
    assert "`weight`" in str(caught[0].message)
    assert "`count`" not in str(caught[0].message)
    assert case.optimizer.stats.outer_changes == 2
    assert case.optimizer.stats.sweeps <= 100 / 8 + 3


def test_the_step_after_a_change_has_the_new_gradient() -> None:
    """At any tolerance: what is dropped is evaluated with what the closure sees now."""
    case, weight = Smooth(tolerance=1e9), 1.0

    def closure(step: int) -> Tensor:
        loss = weight * case.loss()
        loss.backward()
        return loss

    zero = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        for step in range(30):
            weight = 0.0 if step >= 20 else 1.0
            case.optimizer.step(closure)
            zero.append(not case.model[0].weight.grad.any())
    assert zero == [False] * 20 + [True] * 10


def test_another_closure_is_the_one_that_is_evaluated() -> None:
    """One that returns more now and then, with the same gradient, and one with another loss."""
    case = Smooth(tolerance=1e9)

    def usual(step: int) -> Tensor:
        loss = case.loss()
        loss.backward()
        return loss

    def shown(step: int) -> dict[str, Tensor]:
        return {"loss": usual(step)}

    def nothing(step: int) -> str:
        (case.loss() * 0).backward()
        return "nothing"

    def train() -> Iterator[type]:
        for step in range(40):
            given = shown if step % 10 == 5 else nothing if step == 32 else usual
            yield type(case.optimizer.step(given))
            assert bool(case.model[0].weight.grad.any()) == (step != 32)

    with pytest.warns(PicardWarning, match="the closure"):
        kinds = list(train())
    assert [step for step, kind in enumerate(kinds) if kind is dict] == [5, 15, 25, 35]
    assert kinds[32] is str
    assert case.optimizer.stats.sweeps < 20


def later(seen: list[bool], drawn: Iterator[float]) -> None:
    """Trains with a weight that the loop changes before it counts, at step 20, and after that."""
    case, weight = Smooth(tolerance=1e9, audit="always"), 1.0

    def closure(step: int) -> Tensor:
        loss = case.loss() * (1.0 if step < 20 else weight) * next(drawn)
        loss.backward()
        return loss

    for step in range(50):
        weight = 0.0 if 10 <= step < 28 else 1.0
        case.optimizer.step(closure)
        seen.append(bool(case.model[0].weight.grad.any()))


def test_a_change_that_did_no_harm_before_is_no_impure_closure() -> None:
    seen: list[bool] = []
    with pytest.warns(PicardWarning, match="`weight`"):
        later(seen, itertools.repeat(1.0))
    assert seen == [True] * 20 + [False] * 8 + [True] * 22


def test_a_harmless_change_excuses_no_impure_closure() -> None:
    seen: list[bool] = []
    drawn = itertools.chain(itertools.repeat(1.0, 34), itertools.count(1.0))
    with pytest.raises(ImpureClosureError, match="another gradient"):
        later(seen, drawn)
    assert 10 < len(seen) < 28


def test_two_optimizers_that_train_each_others_network_are_told_so() -> None:
    """A GAN with two wrappers: right at any tolerance, but nothing runs ahead; the remedy is named."""
    torch.manual_seed(0)
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    bases = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    wrapped = [ParallelPicardOptimizer(base, window=3, tolerance=float("inf")) for base in bases]

    def closure_of(index: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            bases[index].zero_grad()
            x = torch.randn(4, 2)
            loss = nets[0](nets[1](x)).square().mean() * (1 if index else -1)
            loss.backward()
            return loss

        return closure

    closures = [closure_of(0), closure_of(1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            for optimizer, closure in zip(wrapped, closures, strict=True):
                optimizer.step(closure)
    texts = [str(each.message) for each in caught]
    assert len(texts) == 2
    for other, text in zip((1, 0), texts, strict=True):
        assert f"`nets[{other}].weight`" in text
        assert "another ParallelPicardOptimizer" in text
        assert "[a, b]" in text
    torch.manual_seed(0)
    plain = [nn.Linear(2, 2), nn.Linear(2, 2)]
    bases, nets[:] = [torch.optim.SGD(net.parameters(), lr=0.1) for net in plain], plain
    for step, index in itertools.product(range(6), range(2)):
        with step_rng(0, step):
            closures[index]()
            bases[index].step()
    for optimizer, net in zip(wrapped, plain, strict=True):
        for a, b in zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_optimizers_own_groups_are_its_own_business() -> None:
    """A closure that can see the dicts of the groups is not disturbed by a scheduler that moves their rates."""
    parameter = nn.Parameter(torch.ones(3))
    groups = [{"params": [parameter], "lr": 1e-2}]
    base = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(base, 1e-1, total_steps=20)
    optimizer = ParallelPicardOptimizer(
        base, window=4, tolerance=float("inf"), lr_scheduler=scheduler
    )

    def closure() -> Tensor:
        base.zero_grad()
        loss = groups[0]["params"][0].square().sum()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
        scheduler.step()
    assert optimizer.stats.outer_changes == 0
    assert optimizer.stats.sweeps == 3


@pytest.mark.parametrize("audit", ["always", "never"])
def test_what_the_closure_changes_itself_is_not_the_loops_doing(audit: str) -> None:
    """A count of evaluations does no harm, at tolerance 0 either."""
    sweeps = []
    for counts in (False, True):
        model, seen = Net(), {"calls": 0}
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = ParallelPicardOptimizer(base, window=8, tolerance=0, audit=audit)

        def closure(step: int, counts: bool = counts, seen: dict[str, int] = seen) -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = error(model)  # noqa: B023
            loss.backward()
            seen["calls"] += counts
            return loss

        for _ in range(100):
            optimizer.step(closure)
        sweeps.append(optimizer.stats.sweeps)
        assert optimizer.stats.outer_changes == 0
    assert sweeps[0] == sweeps[1] < 80
    assert seen["calls"] > 100
