"""Arguments of several slots, joined along dim 0 and split again."""

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picardopt import BatchedCallError
from picardopt.rows import (
    NUMBERS,
    check_result,
    count_rows,
    describe,
    distance,
    join,
    split,
    tensors_in,
)
from picardopt.rows import leaves as leaves_of
from tests.helpers.runs import assert_same_bits


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Views:
    poses: Any
    name: Any = "front"


@dataclass
class Cameras:
    views: Any


@dataclass(frozen=True)
class Rows:
    """Stands for a tensor with one row for each of the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self, count: int) -> Tensor:
        return (100 * torch.rand(count, *self.shape)).to(self.dtype)


tensors = st.builds(
    Rows,
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)
leaves = st.one_of(tensors, tensors, st.integers(0, 3), st.sampled_from(["a", None, 1.5, True]))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(lambda x: OrderedDict(a=x), inner),
        st.builds(Point, inner, inner),
        st.builds(Views, inner, inner),
        st.builds(Cameras, inner),
    ),
    max_leaves=8,
)


def fill(tree: Any, count: int) -> Any:
    """Puts tensors of so many rows in place of `Rows`."""
    if isinstance(tree, Rows):
        return tree.make(count)
    if isinstance(tree, Point):
        return Point(*(fill(part, count) for part in tree))
    if isinstance(tree, Views):
        return Views(fill(tree.poses, count), fill(tree.name, count))
    if isinstance(tree, Cameras):
        return Cameras(fill(tree.views, count))
    if isinstance(tree, dict):
        return type(tree)((key, fill(part, count)) for key, part in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(fill(part, count) for part in tree)
    return tree


def is_same(got: Any, expected: Any) -> bool:
    """Whether two trees are alike, in all but the tensors."""
    return repr(type(got)) == repr(type(expected)) and bool(
        describe(got, shared=False) == describe(expected, shared=False)
    )


@given(trees, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_joined_and_split_again_every_slot_has_its_own(tree: Any, counts: list[int]) -> None:
    torch.manual_seed(0)
    arguments = [fill(tree, count) for count in counts]
    assert all(is_same(other, arguments[0]) for other in arguments)
    joined = join(arguments)
    assert is_same(joined, arguments[0])
    found = tensors_in(joined)
    assert all(len(tensor) == sum(counts) for tensor in found)
    if found:
        assert count_rows("f", [joined]) == sum(counts)
        number = any(type(leaf) in NUMBERS for leaf in leaves_of(joined))
        with pytest.raises(BatchedCallError, match="a number") if number else nullcontext():
            check_result("f", joined, sum(counts))
    for mine, own in zip(split(joined, counts), arguments, strict=True):
        assert is_same(mine, own)
        assert_same_bits(tensors_in(mine), tensors_in(own))


@given(trees, trees)
def test_only_alike_trees_are_joined(one: Any, other: Any) -> None:
    torch.manual_seed(0)
    same = describe(fill(one, 1), shared=False) == describe(fill(other, 2), shared=False)
    assert same == (_names(one) == _names(other))


def _names(tree: Any) -> Any:
    """A tree as plain values that tell types apart, as 1 and True."""
    if isinstance(tree, Point | Views | Cameras):
        parts = tree._asdict() if isinstance(tree, Point) else vars(tree)
        return type(tree), [_names(part) for part in parts.values()]
    if isinstance(tree, dict):
        return (
            type(tree),
            sorted(tree) if type(tree) is dict else list(tree),
            [_names(tree[key]) for key in sorted(tree)],
        )
    if isinstance(tree, list | tuple):
        return type(tree), [_names(part) for part in tree]
    return type(tree), tree


def test_shared_values_are_compared_by_content() -> None:
    def key(value: Any) -> Any:
        return describe(value, shared=True)

    table = torch.arange(3.0)
    assert key(table) == key(table.clone())
    assert key({"a": [table]}) == key({"a": [table.clone()]})
    assert key(table) != key(table + 1)
    assert key(table) != key(table.double())
    assert key(1) != key(1.0)
    assert key("a") == key("".join(["a"]))
    assert key(Views(table, "x")) == key(Views(table.clone(), "x"))
    one, other = object(), object()
    assert key(one) == key(one)
    assert key(one) != key(other)
    # By position, tensors without dimensions are shared.
    assert describe(torch.tensor(1.0), shared=False) != describe(torch.tensor(2.0), shared=False)


def test_split_rows_are_the_slots_own_memory() -> None:
    first, second = split(torch.ones(4), [1, 3])
    version = second._version
    first.add_(1)
    assert second.tolist() == [1, 1, 1]
    assert second._version == version


def test_distance_of_results() -> None:
    x = torch.tensor([3.0, 4.0])
    assert distance(x, x) == 0
    assert abs(distance([x * 1.1], [x]) - 0.1) < 1e-6
    nan = torch.tensor([torch.nan, 1.0])
    assert distance(nan, nan.clone()) == 0
    assert distance(nan, torch.tensor([1.0, torch.nan])) == float("inf")
    assert distance(x[:1], x) == float("inf")
