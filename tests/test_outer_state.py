"""What the loop changes between two steps is legal: sequentially the next step sees it, and here it does too."""

import collections
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, PicardWarning, step_rng
from tests.helpers.pool import Pools
from tests.helpers.problems import quantize

STEPS = 300
EVERY = 50


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 3, generator=generator), torch.randn(2, 4, generator=generator)
    return nn.Parameter(first), nn.Parameter(second)


class Net(nn.Module):
    """Piecewise constant in its parameters, so that at tolerance 0 much is accepted ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = parameters()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(x @ quantize(self.first, 0.5).T))
        return hidden @ quantize(self.second, 0.5).T


Loop = Iterator[Callable[..., Tensor]]
"""Yields the closure of each step; what lies between two yields is the loop's own code."""


def error(model: nn.Module) -> Tensor:
    x = torch.randn(6, 3)
    return (model(x) - x[:, :2].sin()).square().mean()


def changing_weight(model: Net, zero_grad: Callable[[], None]) -> Loop:
    weight = 1.0

    def closure(step: int) -> Tensor:
        zero_grad()
        loss = weight * error(model)
        loss.backward()
        return loss

    for step in itertools.count():
        if step % EVERY == EVERY - 1:
            weight *= 0.5
        yield closure


global_weight = 1.0


def changing_global(model: Net, zero_grad: Callable[[], None]) -> Loop:
    global global_weight
    global_weight = 1.0

    def closure(step: int) -> Tensor:
        zero_grad()
        loss = weighted(model)
        loss.backward()
        return loss

    for step in itertools.count():
        if step % EVERY == EVERY - 1:
            global_weight *= 0.5
        yield closure


def weighted(model: Net) -> Tensor:
    return global_weight * error(model)


class Trainer:
    def __init__(self, model: Net, zero_grad: Callable[[], None]) -> None:
        self.model, self.zero_grad, self.weight = model, zero_grad, 1.0

    def closure(self, step: int) -> Tensor:
        self.zero_grad()
        loss = self.weight * error(self.model)
        loss.backward()
        return loss


def changing_attribute(model: Net, zero_grad: Callable[[], None]) -> Loop:
    trainer = Trainer(model, zero_grad)
    for step in itertools.count():
        if step % EVERY == EVERY - 1:
            trainer.weight *= 0.5
        yield trainer.closure


def target_network(model: Net, zero_grad: Callable[[], None]) -> Loop:
    target = Net().eval()

    def closure(step: int) -> Tensor:
        zero_grad()
        x = torch.randn(6, 3)
        with torch.no_grad():
            goal = x[:, :2].sin() + 0.5 * target(x)
        loss = (model(x) - goal).square().mean()
        loss.backward()
        return loss

    for step in itertools.count():
        if step % EVERY == EVERY - 1:
            target.load_state_dict(model.state_dict())
        yield closure


def moving_average(model: Net, zero_grad: Callable[[], None]) -> Loop:
    """A target that follows at every step: exact, though nothing can run ahead."""
    for closure in target_network(model, zero_grad):
        target = inspect.getclosurevars(closure).nonlocals["target"]
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        yield closure


def train_and_eval(model: Net, zero_grad: Callable[[], None]) -> Loop:
    closures = changing_weight(model, zero_grad)
    for step, closure in enumerate(closures):
        if step % 30 == 29:
            model.train(not model.training)
        yield closure


def rescaled_tensor(model: Net, zero_grad: Callable[[], None]) -> Loop:
    scales = [torch.ones(2)]

    def closure(step: int) -> Tensor:
        zero_grad()
        x = torch.randn(6, 3)
        loss = (scales[0] * (model(x) - x[:, :2].sin())).square().mean()
        loss.backward()
        return loss

    for step in itertools.count():
        if step % EVERY == EVERY - 1:
            scales[0].mul_(0.5)
        yield closure


def replay_buffer(model: Net, zero_grad: Callable[[], None]) -> Loop:
    generator = torch.Generator().manual_seed(1)
    buffer = collections.deque([torch.randn(3, generator=generator)], maxlen=200)

    def closure(step: int) -> Tensor:
        zero_grad()
        picks = torch.randint(len(buffer), (6,)).tolist()
        x = torch.stack([buffer[pick] for pick in picks])
        loss = (model(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        return loss

    for step in itertools.count():
        if step % 10 == 9:
            buffer.extend(torch.randn(20, 3, generator=generator))
        yield closure


def batch_of_the_loop(model: Net, zero_grad: Callable[[], None]) -> Loop:
    """``batch = next(batches)`` before ``step``: exact at tolerance 0."""
    generator = torch.Generator().manual_seed(2)
    while True:
        x = torch.randn(6, 3, generator=generator)

        def closure(x: Tensor = x) -> Tensor:
            zero_grad()
            loss = (model(x) - x[:, :2].sin()).square().mean()
            loss.backward()
            return loss

        yield closure


def two_closures_in_turn(model: Net, zero_grad: Callable[[], None]) -> Loop:
    first = changing_weight(model, zero_grad)
    second = rescaled_tensor(model, zero_grad)
    return (next(first if step // 7 % 2 else second) for step in itertools.count())


LOOPS: dict[str, Callable[[Net, Callable[[], None]], Loop]] = {
    made.__name__: made
    for made in (
        changing_weight,
        changing_global,
        changing_attribute,
        target_network,
        moving_average,
        train_and_eval,
        rescaled_tensor,
        replay_buffer,
        batch_of_the_loop,
        two_closures_in_turn,
    )
}
AT_EVERY_STEP = ("moving_average", "batch_of_the_loop")


def sequential(name: str, steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step, closure in enumerate(itertools.islice(LOOPS[name](model, base.zero_grad), steps)):
        with step_rng(0, step):
            by_step = "step" in inspect.signature(closure).parameters
            losses.append((closure(step) if by_step else closure()).detach())
            base.step()
    return losses, [p.detach().clone() for p in model.parameters()]


def ahead(
    name: str, steps: int = STEPS, **options: Any
) -> tuple[list[Tensor], list[Tensor], ParallelPicardOptimizer]:
    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ParallelPicardOptimizer(base, **{"window": 8, "tolerance": 0, **options})
    closures = itertools.islice(LOOPS[name](model, optimizer.zero_grad), steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        losses = [optimizer.step(closure) for closure in closures]
    return losses, [p.detach().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize(
    ("name", "window"), [*((name, 8) for name in LOOPS), ("changing_weight", 2)]
)
def test_tolerance_zero_is_the_sequential_run(name: str, window: int) -> None:
    expected_losses, expected = sequential(name)
    losses, got, optimizer = ahead(name, window=window)
    for step, (a, b) in enumerate(zip(losses, expected_losses, strict=True)):
        assert torch.equal(a, b), f"step {step}"
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stats = optimizer.stats
    if name in AT_EVERY_STEP:
        assert stats.sweeps == STEPS
    else:  # and it did run ahead: else this shows nothing
        assert stats.sweeps < 0.8 * STEPS
        assert stats.outer_changes > 0
        assert stats.outer_changes <= STEPS // 7


def on_ranks(name: str, tolerance: Any, bar: bool) -> tuple[list[Tensor], list[Tensor], int, int]:
    """One rank of a run; with `bar`, rank 0 alone counts steps where the closure sees it."""
    if not bar:
        losses, got, optimizer = ahead(name, 110, tolerance=tolerance)
        return losses, got, optimizer.stats.outer_changes, optimizer.stats.sweeps
    rank = torch.distributed.get_rank()
    progress, model = {"step": 0}, Net()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ParallelPicardOptimizer(base, window=8, tolerance=tolerance)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = error(model)
        loss.backward()
        progress.get("step")
        return loss

    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        for step in range(60):
            losses.append(optimizer.step(closure))
            if rank == 0:
                progress["step"] = step
    got = [p.detach().clone() for p in model.parameters()]
    return losses, got, optimizer.stats.outer_changes, optimizer.stats.sweeps


@pytest.mark.parametrize("tolerance", [0, None])
@pytest.mark.parametrize("bar", [False, True])
def test_ranks_drop_together(pools: Pools, bar: bool, tolerance: Any) -> None:
    results = pools(2).run(on_ranks, "changing_weight", tolerance, bar)
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert first[2:] == second[2:]
    if tolerance == 0 and not bar:
        expected_losses, expected = sequential("changing_weight", 110)
        assert all(torch.equal(a, b) for a, b in zip(first[0], expected_losses, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first[1], expected, strict=True))
        assert first[2] > 0
    if bar:
        assert (first[3] == 60) == (tolerance == 0)


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


def test_flush_is_for_what_cannot_be_seen(tmp_path: Any) -> None:
    """A weight in a file: with `flush` after each change the run is the sequential one."""
    path = tmp_path / "weight"

    def run(
        step_of: Callable[[Net], tuple[Callable[..., Any], Callable[[], None]]],
    ) -> list[Tensor]:
        model = Net()
        path.write_text("1.0")

        def closure(step: int) -> Tensor:
            model.zero_grad()
            loss = float(path.read_text()) * error(model)
            loss.backward()
            return loss

        step_once, flush = step_of(model)
        for step in range(120):
            if step % EVERY == EVERY - 1:
                path.write_text("0.25")
                flush()
            step_once(closure, step)
        return [p.detach().clone() for p in model.parameters()]

    def plain(model: Net) -> tuple[Callable[..., Any], Callable[[], None]]:
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step_once(closure: Callable[..., Any], step: int) -> None:
            with step_rng(0, step):
                closure(step)
                base.step()

        return step_once, lambda: None

    def ours(model: Net) -> tuple[Callable[..., Any], Callable[[], None]]:
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = ParallelPicardOptimizer(base, window=8, tolerance=0, audit="never")
        return lambda closure, step: optimizer.step(closure), optimizer.flush

    assert all(torch.equal(a, b) for a, b in zip(run(plain), run(ours), strict=True))


def test_two_wrapped_optimizers_that_train_each_others_networks() -> None:
    """Each sees the other's parameters change, and says so."""
    torch.manual_seed(0)
    makes, judges = nn.Linear(2, 2), nn.Linear(2, 1)
    first, second = (
        ParallelPicardOptimizer(torch.optim.SGD(m.parameters(), lr=1e-2), window=4, tolerance=1e9)
        for m in (makes, judges)
    )

    def make(step: int) -> Tensor:
        first.zero_grad()
        loss = -judges(makes(torch.randn(4, 2))).mean()
        loss.backward(inputs=list(makes.parameters()))
        return loss

    def judge(step: int) -> Tensor:
        second.zero_grad()
        loss = judges(makes(torch.randn(4, 2))).square().mean()
        loss.backward(inputs=list(judges.parameters()))
        return loss

    def train() -> None:
        for _ in range(20):
            second.step(judge)
            first.step(make)

    with pytest.warns(PicardWarning, match=r"judges\.weight|makes\.weight"):
        train()


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


def test_never_looks_at_tolerance_zero_all_the_same() -> None:
    expected_losses, _ = sequential("changing_weight", 110)
    losses, _, optimizer = ahead("changing_weight", 110, audit="never")
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    assert optimizer.stats.audits == 0
