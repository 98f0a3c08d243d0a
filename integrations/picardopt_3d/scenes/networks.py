"""The small networks of scenes, whose values have one row per channel, and the background."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with ReLU between them, applied to columns.

    Args:
        inputs: Input channels.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
        outputs: Output channels.
        fresh: Factor on the initial weights of the last layer; with 0 the network starts as the constant 0.
    """

    def __init__(
        self, inputs: int, width: int, depth: int, outputs: int, fresh: float = 1.0
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth, outputs]
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(sizes)
        )
        with torch.no_grad():
            for parameter in self.layers[-1].parameters():
                parameter.mul_(fresh)

    def forward(self, values: Tensor) -> Tensor:
        """Maps values `[inputs, count]` to `[outputs, count]`."""
        *hidden, last = cast("Iterable[nn.Linear]", self.layers)
        for layer in hidden:
            values = F.relu(torch.addmm(layer.bias[:, None], layer.weight, values))
        return torch.addmm(last.bias[:, None], last.weight, values)

    def with_slope(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates the network and the derivative of its first output in closed form; gradients can pass through.

        Args:
            values: Inputs, `[inputs, count]`.

        Returns:
            The outputs, `[outputs, count]`, and the first one's derivatives by the inputs, `[inputs, count]`.
        """
        *hidden, last = cast("Iterable[nn.Linear]", self.layers)
        active = []
        for layer in hidden:
            values = F.relu(torch.addmm(layer.bias[:, None], layer.weight, values))
            active.append((values > 0).to(values.dtype))
        slope = last.weight[:1].T  # [width, 1]
        for layer, mask in zip(reversed(hidden), reversed(active), strict=True):
            slope = layer.weight.T @ (slope * mask)
        return torch.addmm(last.bias[:, None], last.weight, values), slope


def spherical_harmonics(directions: Tensor) -> Tensor:
    """Returns the real, orthonormal spherical harmonics of degrees 0 to 2 of directions `[count, 3]`, `[9, count]`."""
    x, y, z = directions.T
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            -0.48860251190291987 * y,
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575756 * z * z - 0.31539156525252005,
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    )


class Background(nn.Module):
    """The background: one colour, or a colour that depends on the direction.

    Args:
        kind: "solid" or "neural" (spherical harmonics of the direction, a small network, a sigmoid).
        colour: Colour of a "solid" background, RGB in [0, 1].
        width: Width of the hidden layer of a "neural" background.
    """

    colour: Tensor

    def __init__(self, kind: str, colour: tuple[float, float, float], width: int = 16) -> None:
        super().__init__()
        self.register_buffer("colour", torch.tensor(colour), persistent=False)
        self.network = Mlp(9, width, 1, 3) if kind == "neural" else None

    def forward(self, directions: Tensor) -> Tensor:
        """Returns the colour behind rays of directions `[rays, 3]`, `[3]` or, if it depends on them, `[rays, 3]`."""
        if self.network is None:
            return self.colour
        return torch.sigmoid(self.network(spherical_harmonics(directions))).T


def check_background(kind: str, colour: tuple[float, float, float]) -> None:
    """Checks a background's kind and colour.

    Raises:
        ValueError: The kind is unknown or the colour is out of range.
    """
    if kind not in ("solid", "neural"):
        raise ValueError(f'background={kind!r}: give "solid" or "neural"')
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"background_colour={colour!r}: give red, green and blue in [0, 1]")
