"""One exchange a sweep: header, losses and gradients leave together; nothing but headers is used before these agree."""

import gc
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt import ParallelPicardOptimizer, RankMismatchError
from picardopt.engines import distributed
from picardopt.engines.packing import dumps
from picardopt.ranks import make_grid
from picardopt.transport import CollectiveTransport, PairwiseTransport, Payload
from tests.helpers.pool import Pool, Pools
from tests.helpers.runs import (
    SECONDS,
    Case,
    Trace,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    sequential,
    wrap,
)

CASE = Case("network", "Adam", steps=14)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts a rank's exchanges."""
    count, honest = [0], PairwiseTransport.all_gather

    def all_gather(self: PairwiseTransport, *args: Any) -> None:
        count[0] += 1
        honest(self, *args)

    with mock.patch.object(PairwiseTransport, "all_gather", all_gather):
        yield count


def exchanges(lengths: list[int]) -> tuple[list[int], list[Any]]:
    """Sweeps with losses of given lengths: the exchanges of each, and what the steps returned."""
    weight = torch.nn.Parameter(torch.ones(5))
    window = dist.get_world_size()
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD([weight], lr=0.1), tolerance=float("inf"), audit="never"
    )

    def closure(step: int) -> dict[str, Any]:
        optimizer.zero_grad()
        (weight * torch.randn(5)).sum().backward()
        image = torch.arange(lengths[step // window]) + step
        return {"loss": torch.tensor(float(step)), "image": image, "name": f"step {step}"}

    found, returned = [], []
    for _ in lengths:
        with counted() as count:
            returned += [optimizer.step(closure) for _ in range(window)]
        found.append(count[0])
    return found, returned


def test_a_sweep_is_one_exchange(pools: Pools) -> None:
    """And one of the measures; losses that do not fit follow, and fit from then on."""
    lengths = [1, 1, 100_000, 100_000, 3, 3, 0]
    for counts, returned in pools(3).run(exchanges, lengths):
        assert counts == [2, 2, 3, 2, 2, 2, 2]
        assert len(returned) == 3 * len(lengths)
        for step, value in enumerate(returned):
            image = torch.arange(lengths[step // 3]) + step
            expected = {"loss": torch.tensor(float(step)), "image": image, "name": f"step {step}"}
            assert_same_bits(value, expected)


def refused(lengths: list[int]) -> list[Any]:
    """The check refuses payloads whose lengths differ by rank; the next exchange is as any other."""
    grid = make_grid(None, None)
    assert grid is not None
    ranks, transport = grid.everyone, PairwiseTransport(20.0)
    header = torch.full((8,), ranks.rank, dtype=torch.uint8)
    seen: list[Any] = []

    def refuse() -> None:
        raise RankMismatchError(f"planted on {headers.flatten().tolist()}")

    for check, length in [(refuse, lengths[ranks.rank]), (lambda: None, min(lengths))]:
        headers = torch.zeros((ranks.size, 8), dtype=torch.uint8)
        out = torch.zeros((ranks.size, length), dtype=torch.uint8)
        own = torch.full((length,), 7 + ranks.rank + length % 5, dtype=torch.uint8)
        try:
            transport.all_gather(header, headers, ranks, Payload(own, out, check))
        except RankMismatchError as error:
            seen.append(str(error))
    return [*seen, out[:, :3].tolist()]


@pytest.mark.parametrize("lengths", [(100_000, 10, 10), (10, 10, 4_000_000), (10, 10, 10)])
def test_a_refused_payload_reaches_nobody(pools: Pools, lengths: tuple[int, ...]) -> None:
    """gloo would end a process whose buffer is shorter than the message."""
    headers = [rank for rank in range(3) for _ in range(8)]
    for report in pools(3).run(refused, list(lengths)):
        assert report == [f"planted on {headers}", [[7 + rank] * 3 for rank in range(3)]]


def abandoned(length: int) -> list[Any]:
    """A refused payload is still under way while all that knew of it is freed; then others exchange."""
    grid = make_grid(None, None)
    assert grid is not None
    ranks = grid.everyone

    def refuse() -> None:
        raise RankMismatchError("planted")

    def exchange(size: int, check: Callable[[], object]) -> list[Any]:
        header = torch.full((8,), ranks.rank, dtype=torch.uint8)
        headers, out = (
            torch.zeros((ranks.size, 8), dtype=torch.uint8),
            torch.zeros((ranks.size, size), dtype=torch.uint8),
        )
        payload = Payload(torch.full((size,), ranks.rank, dtype=torch.uint8), out, check)
        PairwiseTransport(10.0).all_gather(header, headers, ranks, payload)
        return out[:, 0].tolist()

    gc.freeze()  # so that the next collection is quicker than the payload
    with suppress(RankMismatchError):
        exchange(length, refuse)
    gc.collect()
    gc.unfreeze()
    return [exchange(8, lambda: None) for _ in range(20)]


def test_a_refused_payload_blocks_nobody(pools: Pools) -> None:
    """gloo reads nothing more from a connection if the buffer of a half-received message is freed."""
    for report in pools(3).run(abandoned, 64_000_000):
        assert report == [[0, 1, 2]] * 20


def elsewhere(where: str) -> tuple[str, float]:
    """Rank 1 has more parameters than the others, or builds another optimizer, between two sweeps."""
    weight, more = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(100_000))
    base, odd = torch.optim.SGD([weight], lr=0.1), dist.get_rank() == 1

    def build() -> ParallelPicardOptimizer:
        return ParallelPicardOptimizer(base, tolerance=0, timeout=60.0)

    def closure() -> Tensor:
        loss = sum((p * torch.randn(p.shape)).sum() for p in (weight, more) if p.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        return loss

    optimizer = build()
    more.requires_grad_(False)
    for _ in range(2):
        optimizer.step(closure)
    optimizer.flush()
    started, text = time.perf_counter(), ""
    try:
        if odd and where == "construction":
            build()
        if odd and where == "layout":
            more.requires_grad_(True)
            optimizer.add_param_group({"params": [more]})
        optimizer.step(closure)
    except RankMismatchError as error:
        text = str(error)
    return text, time.perf_counter() - started


@pytest.mark.parametrize("where", ["layout", "construction"])
def test_ranks_whose_messages_differ_in_length(pool: Pool, where: str) -> None:
    """A named error on every rank, not a process that gloo ends; and the group serves on."""
    about = {"layout": "the parameters' shapes", "construction": "rank 1: construction"}[where]
    for text, seconds in pool.run(elsewhere, where):
        assert about in text
        assert seconds < SECONDS
    lengths = [1, 1]
    for counts, _ in pool.run(exchanges, lengths):
        assert counts == [2, 2]


TRANSPORTS = {
    "pairwise": lambda device, timeout: PairwiseTransport(timeout),
    "collective": CollectiveTransport,
}


def gathered(transport: str, window: int | None, bad: int) -> tuple[Trace, str]:
    """A run with a transport; before one step rank 1 changes its parameters."""
    with mock.patch.object(
        distributed, "make_transport", lambda group, *args: TRANSPORTS[transport](*args)
    ):
        problem, optimizer, _ = wrap(CASE, window=window, timeout=60.0)
    closure, trace, text = make_closure(problem, optimizer.zero_grad), Trace(), ""
    for step in range(CASE.steps):
        if step == bad:
            optimizer.flush()
            text = edited(optimizer, problem.parameters[0], closure)
        trace.record(optimizer.step(closure), problem, optimizer)
    return trace, text


def edited(optimizer: ParallelPicardOptimizer, parameter: Tensor, closure: Any) -> str:
    """Steps with other parameters on rank 1, and puts them back."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter += dist.get_rank() == 1
    with pytest.raises(RankMismatchError) as caught:
        optimizer.step(closure)
    with torch.no_grad():
        parameter.copy_(before)
    return str(caught.value)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_ranks_disagreed_the_run_goes_on(
    pools: Pools, transport: str, window: int | None
) -> None:
    """By either transport; the collectives are gloo's here, NCCL's on accelerators."""
    expected = sequential(CASE)
    for trace, text in pools(3).run(gathered, transport, window, 6):
        assert_same_trace(trace, expected)
        assert "the parameters' values" in text


def tensors() -> dict[str, Tensor]:
    whole = torch.arange(6, dtype=torch.float32).view(2, 3)
    return {
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 3),
        "bfloat16": whole.bfloat16(),
        "bool": whole > 2,
        "complex": torch.complex(whole, -whole),
        "conjugate": torch.complex(whole, -whole).conj(),
        "transposed": whole.T,
        "expanded": torch.ones(1).expand(4),
        "leaf": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(whole),
        "sparse": whole.to_sparse(),
    }


@pytest.mark.parametrize("name", tensors())
def test_a_packed_tensor_is_the_same(name: str) -> None:
    tensor = tensors()[name]
    got = pickle.loads(dumps({"a": [tensor]}))["a"][0]
    assert type(got) is type(tensor)
    assert (got.dtype, got.shape, got.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert got.requires_grad == tensor.requires_grad
    if name == "sparse":
        got, tensor = got.to_dense(), tensor.to_dense()
    assert_same_bits(got.detach().resolve_conj(), tensor.detach().resolve_conj())
    if name != "expanded":
        got.detach().zero_()  # as any tensor, it may be written to
