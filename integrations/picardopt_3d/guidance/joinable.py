"""Score models whose views of several steps can be evaluated in one call, and the parts of such a call.

A guidance draws a step's random numbers first. What remains is a function whose rows (views, noise, cameras) do not
depend on each other, which `picardopt.batched` joins over the steps that one worker evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from picardopt_3d.guidance.protocol import ScoreModel


@runtime_checkable
class JoinableScore(ScoreModel, Protocol):
    """A score model whose views of several steps can share a call, because no view depends on another one.

    All models of this package are joinable. A score model that is not is evaluated step by step.

    Attributes:
        space: Channels, height and width of a view in the model's space.
        joined_views: Most views of several steps in one pass.
    """

    space: tuple[int, int, int]
    joined_views: int

    def draw(self, batch: int) -> Tensor | None:
        """Draws the random numbers of `to_model_space` before it is called.

        They come from torch's global CPU generator, in the same order as if `to_model_space` drew them itself.

        Args:
            batch: Number of views.

        Returns:
            The numbers, `[batch, ...]`; None: `to_model_space` needs none, and is called without any.
        """
        ...

    def to_model_space(self, views: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Converts views to the model's space; see `ScoreModel`.

        Args:
            views: RGB in [0, 1], `[batch, 3, height, width]`.
            drawn: From `draw`; None: they are drawn here, if any are needed.
        """
        ...


def draw_for(score: JoinableScore, views: Tensor) -> tuple[Tensor, ...]:
    """Draws what views need on their way to the model's space: `(numbers,)` on their device, or nothing."""
    drawn = score.draw(len(views))
    return () if drawn is None else (drawn.to(views.device),)


def most_at_once(score: JoinableScore, batch: int) -> int:
    """Returns how many views a pass may take: those of one step, or as many as several steps may share."""
    return max(batch, score.joined_views)


def joined_if_shared(
    function: Callable[..., Any], score: JoinableScore, batch: int
) -> Callable[..., Any]:
    """Returns the function to call: the batched one, or itself where no two steps' views fit into one pass.

    Waiting for each other would save nothing then, and keep the graphs of all steps.

    Args:
        function: A function that `picardopt.batched` marked.
        score: The score model.
        batch: Views of one step.
    """
    if 2 * batch <= score.joined_views:
        return function
    alone: Callable[..., Any] = torch.no_grad()(function.__wrapped__)  # type: ignore[attr-defined]
    return alone


def in_parts(at_once: int, *rows: Any) -> Iterator[tuple[Any, ...]]:
    """Splits rows into parts of similar length.

    Args:
        at_once: Most rows of a part.
        rows: Tensors, cameras and tuples of tensors, all with the same number of rows, the first one a tensor.

    Yields:
        The same with some of their rows.
    """
    count = len(rows[0])
    size = math.ceil(count / math.ceil(count / at_once))
    for start in range(0, count, size):
        some = slice(start, start + size)
        yield tuple(
            tuple(each[some] for each in given) if isinstance(given, tuple) else given[some]
            for given in rows
        )


class _WithGradient(torch.autograd.Function):
    """A value that does not depend on views as far as it goes, but has a given gradient by them."""

    @staticmethod
    def forward(ctx: Any, views: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """Returns the value."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient times the weight that the value has in the loss."""
        (gradient,) = ctx.saved_tensors
        return weight * gradient, None, None


def with_gradient(views: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """Returns a scalar of a given value whose gradient by views is given too.

    Args:
        views: Rendered views, with a gradient, `[batch, ...]`.
        gradient: The gradient of the scalar by them, of the same shape.
        value: What the scalar is, `[]`.
    """
    scalar: Tensor = _WithGradient.apply(views, gradient, value)  # type: ignore[no-untyped-call]
    return scalar
