"""Training loops that change between two steps what their closures see, sequential and run ahead."""

import collections
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, PicardWarning, step_rng
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
