"""Small training problems for the exactness tests.

The gradients are piecewise constant: a network of *quantized* parameters with a straight-through
gradient. A wrong guess within a quantization cell gives the right bits of the gradient, so that at
tolerance 0 many steps are accepted per sweep; a guess across a cell's edge gives an arbitrarily
wrong one, so that a broken rollout or a step's wrong randomness is seen.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cell: float) -> Tensor:
        return torch.round(values / cell) * cell

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def quantize(values: Tensor, cell: float = 0.125) -> Tensor:
    """Rounds to multiples of ``cell``; the gradient passes through."""
    return _Quantize.apply(values, cell)


@dataclass
class Problem:
    """Parameters (or groups) for an optimizer and the loss of a step."""

    groups: list[Any]
    loss: Callable[[int], Tensor]
    after_backward: Callable[[], None] = lambda: None

    @property
    def parameters(self) -> list[nn.Parameter]:
        if isinstance(self.groups[0], dict):
            return [p for group in self.groups for p in group["params"]]
        return list(self.groups)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def _batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One step's batch, drawn from all three global generators."""
    x = torch.randn(6, 3, dtype=dtype) + random.random()
    return x, torch.as_tensor(np.random.standard_normal((6, 2)), dtype=dtype)


def network(dtype: torch.dtype = torch.float32) -> Problem:
    """Two quantized layers, a scalar gain and a bias."""
    first, bias = draw((4, 3), 1, dtype), draw((4,), 2, dtype)
    second, gain = draw((2, 4), 3, dtype), nn.Parameter(torch.tensor(1.3, dtype=dtype))

    def loss(step: int) -> Tensor:
        x, y = _batch(dtype)
        hidden = torch.tanh(x @ quantize(first).T + quantize(bias))
        return (hidden @ quantize(second).T * quantize(gain) - y).square().mean()

    return Problem([first, bias, second, gain], loss)


def matrices(dtype: torch.dtype = torch.float32) -> Problem:
    """Only matrices, for optimizers that take nothing else (Muon)."""
    first, second = draw((4, 3), 1, dtype), draw((2, 4), 3, dtype)

    def loss(step: int) -> Tensor:
        x, y = _batch(dtype)
        return (torch.tanh(x @ quantize(first).T) @ quantize(second).T - y).square().mean()

    return Problem([first, second], loss)


def bf16() -> Problem:
    return network(torch.bfloat16)


def float64() -> Problem:
    return network(torch.float64)


def smooth() -> Problem:
    """The network without quantization: every guess is wrong by a little."""
    first, bias = draw((4, 3), 1), draw((4,), 2)
    second, gain = draw((2, 4), 3), nn.Parameter(torch.tensor(1.3))

    def loss(step: int) -> Tensor:
        x, y = _batch(torch.float32)
        return (torch.tanh(x @ first.T + bias) @ second.T * gain - y).square().mean()

    return Problem([first, bias, second, gain], loss)


def complex64() -> Problem:
    """A complex and a real parameter."""
    weight = nn.Parameter(torch.view_as_complex(draw((3, 2), 4).detach().clone()))
    scale = draw((3,), 5)

    def loss(step: int) -> Tensor:
        x = torch.randn(5, 3)
        real = quantize(torch.view_as_real(weight))
        return (x * quantize(scale) @ real).square().mean() + (torch.randn(3, 2) * real).sum()

    return Problem([weight, scale], loss)


def groups() -> Problem:
    """Three groups, each with its own learning rate."""
    problem = network()
    first, bias, second, gain = problem.parameters
    problem.groups = [
        {"params": [first, bias], "lr": 3e-3},
        {"params": [second], "lr": 1e-3},
        {"params": [gain], "lr": 2e-3},
    ]
    return problem


def partial() -> Problem:
    """Gradients that are None always, on odd steps, and from step 6 on; one frozen parameter."""
    problem = network()
    first, bias, second, gain = problem.parameters
    never, odd, early = draw((3,), 6), draw((2, 2), 7), draw((3,), 8)
    frozen = draw((4,), 9).requires_grad_(False)

    def loss(step: int) -> Tensor:
        value = problem.loss(step) + (frozen * torch.tanh(quantize(bias))).sum()
        if step % 2:
            value = value + (quantize(odd) * torch.randn(2, 2)).sum() * quantize(gain)
        if step < 6:
            value = value + (quantize(early).square() * torch.rand(3)).sum()
        return value

    return Problem([never, first, bias, frozen, odd, second, gain, early], loss)


def tied() -> Problem:
    """One matrix used as an embedding and, transposed, as the output layer."""
    table, inner = draw((5, 4), 10), draw((4, 4), 11)

    def loss(step: int) -> Tensor:
        words = torch.randint(5, (8,))
        hidden = torch.tanh(quantize(table)[words] @ quantize(inner))
        return nn.functional.cross_entropy(hidden @ quantize(table).T, (words + 1) % 5)

    return Problem([table, inner], loss)


def clipping() -> Problem:
    """Global-norm clipping in the closure, where the whole gradient is."""
    problem = network()
    return replace(
        problem,
        after_backward=lambda: (torch.nn.utils.clip_grad_norm_(problem.parameters, 0.5), None)[1],
    )


def strided() -> Problem:
    """Parameters that are transposed, views of one buffer, empty, and of one element."""
    buffer = draw((20,), 12).detach()
    first, second = (
        nn.Parameter(draw((3, 4), 13).detach().t()),
        nn.Parameter(buffer[2:10].view(2, 4)),
    )
    empty, one = nn.Parameter(torch.empty(0, 3)), nn.Parameter(buffer[10:11])

    def loss(step: int) -> Tensor:
        x, y = _batch(torch.float32)
        hidden = torch.tanh(x @ quantize(first).T)
        return (hidden @ quantize(second).T * quantize(one) - y).square().mean() + empty.sum()

    return Problem([first, empty, second, one], loss)


def integers() -> Problem:
    """Integer-valued parameters with an optimizer that keeps them so (see ``catalog``)."""
    weight = nn.Parameter(torch.tensor([3.0, -7.0, 20.0, 41.0]))

    def loss(step: int) -> Tensor:
        signs = torch.randint(-3, 4, (4,)).to(weight.dtype)
        return (quantize(weight, 16.0) * signs).sum() + quantize(weight, 32.0).abs().sum()

    return Problem([weight], loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    made.__name__: made
    for made in (
        network, matrices, bf16, float64, smooth, complex64, groups, partial, tied, clipping,
        strided, integers,
    )
}  # fmt: skip
