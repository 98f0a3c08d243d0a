"""The sums of squares that residuals are made of: right to rounding at any scale, and 0 only for equal values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picardopt.layout import ParameterLayout
from picardopt.sweep import (
    _squares_on_accelerator,
    _squares_on_cpu,
    squared_distances,
    squared_lengths,
    squares,
)

BLOCKS = (1, 7, 1 << 15, (1 << 15) + 1, 100_000)


@pytest.mark.parametrize("length", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_squares_are_those_of_float64(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    a, b, c = (torch.randn(length, generator=generator).to(dtype) for _ in range(3))
    found = squares([[a], [c]], [[b], [a]])
    wide = [(a.double() - b.double()).square().sum(), (c.double() - a.double()).square().sum()]
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, torch.stack(wide), rtol=1e-5, atol=0)
    torch.testing.assert_close(squares([[a]])[0], a.double().square().sum(), rtol=1e-5, atol=0)


@given(st.integers(-148, 37), st.integers(1, 40_000), st.integers(0, 10**6))
def test_one_element_that_differs_is_seen_at_any_scale(exponent: int, length: int, at: int) -> None:
    """Squares of small numbers vanish in float32, and those of large ones overflow."""
    value = max(10.0**exponent, 1e-45)
    a, b = torch.zeros(length), torch.zeros(length)
    assert squares([[a]], [[b]]) == 0
    a[at % length] = value
    expected = float(a[at % length].double()) ** 2
    assert expected > 0
    assert float(squares([[a]], [[b]])) == pytest.approx(expected, rel=1e-6)
    assert float(squares([[a]])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    a, b = torch.ones(50_000), torch.ones(50_000)
    a[40_000] = bad
    assert not torch.isfinite(squares([[a]], [[b]])).any()


def test_groups_of_several_dtypes_and_none() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0], dtype=torch.float64), torch.zeros(0)]
    layout = ParameterLayout(values, sizes=[2, 1])
    row, zero = layout.row(), layout.row()
    row.store(values)
    assert squared_distances([(row, zero), (row, row)], layout.numels).tolist() == [
        [pytest.approx(14 / 3), 0]
    ]
    assert squared_lengths(row, layout.numels).tolist() == [pytest.approx(14 / 3)]
    assert squares([[], []]).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_a_row_is_finite_if_all_its_elements_are(bad: float, dtype: torch.dtype) -> None:
    values = [torch.zeros(0, dtype=dtype), torch.ones(1000, dtype=dtype), torch.ones(3)]
    row = ParameterLayout(values).row()
    row.store(values)
    assert row.finite()
    assert row.is_finite()
    row.tensors[1][7] = 1e4 if dtype == torch.float16 else 1e30  # its square overflows
    assert row.is_finite()
    row.tensors[1][999] = bad
    assert not row.finite()
    assert not row.is_finite()


def test_both_ways_to_sum_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 70_000, generator=generator).unbind() for _ in range(2))
    for others in (b, ()):
        there = _squares_on_accelerator(a, others)
        torch.testing.assert_close(
            squares([[x] for x in a], [[y] for y in others] or None), there, rtol=1e-6, atol=0
        )
        assert _squares_on_cpu(a, others) == pytest.approx(there.tolist(), rel=1e-6)
