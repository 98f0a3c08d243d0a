"""Resized pictures: the way of CUDA, whose gradients repeat, against torch's own on a CPU."""

from __future__ import annotations

import pytest
import torch
from picardopt_3d.resizing import _multiplied, resize


@pytest.mark.parametrize("shape", [(40, 72), (24, 24), (32, 8), (32, 32)])
def test_products_are_the_interpolation(shape: tuple[int, int]) -> None:
    pictures = torch.rand(2, 4, *shape, requires_grad=True)
    weights = torch.rand(2, 4, 32, 32)
    expected, found = resize(pictures, 32), _multiplied(pictures, 32)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad((weights * expected).sum(), pictures)
    (other,) = torch.autograd.grad((weights * found).sum(), pictures)
    torch.testing.assert_close(other, slope)
