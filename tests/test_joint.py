"""Slots of a rank share calls of batched functions: nothing changes but the number of calls."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import (
    AdaptiveTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
    batched,
    step_rng,
)
from tests.helpers.runs import assert_same_bits
from tests.helpers.shared import (
    LAYERS,
    LOSSES,
    SIZE,
    STEPS,
    Scene,
    assert_same,
    one_call,
    run,
    slot_by_slot,
    target,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


def both(make: Callable[[], Scene], *args: Any, **options: Any) -> Any:
    """A run that joins calls, compared with the same one slot by slot."""
    got = run(make(), *args, **options)
    with slot_by_slot():
        expected = run(make(), *args, **options)
    assert expected.stats.joined_calls == expected.stats.calls_saved == 0
    assert_same(got, expected)
    assert got.stats.joined_calls > 0
    assert got.stats.calls_saved >= got.stats.joined_calls
    return got.stats


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("window", [2, 8])
def test_joined_runs_have_the_bits_of_slot_by_slot(loss: str, window: int) -> None:
    stats = both(Scene, LOSSES[loss], window=window)
    assert max(stats.strides) > 1


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_graphs_survive_the_other_slots(layer: str, base: type[torch.optim.Optimizer]) -> None:
    """Saved tensors, attributes, recomputed forwards and carried statistics are the slot's own."""
    both(lambda: Scene(layer), base=base)


def test_calls_are_counted() -> None:
    made = []

    def counted(x: Tensor, level: Tensor) -> Tensor:
        made.append(len(x))
        return target(x, level)

    stats = run(Scene(), score=batched(counted), audit="never", steps=17, window=4).stats
    slots = [record.slots for record in stats.records]
    # A call for each slot until one was seen to be batched, and one more to check the function.
    expected = slots[0] + len(slots[1:]) + 1
    assert len(made) == expected
    joined = [slots for slots in slots[1:] if slots > 1]
    assert stats.joined_calls == len(joined)
    assert stats.calls_saved == sum(joined) - len(joined)
    assert made[slots[0]] == 3 * slots[1]


def test_at_tolerance_0_every_bit_is_sequential_and_no_call_is_joined() -> None:
    scene, calls = Scene(), batched(nn.Linear(SIZE, SIZE).double())

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view()
        return (scene.second(seen).sign() * calls(seen.detach()) + seen).mean()

    got = run(scene, loss, tolerance=0)
    assert got.stats.joined_calls == got.stats.calls_saved == 0
    other = Scene()
    base = torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(STEPS):
        base.zero_grad()
        with step_rng(0, step):
            value = loss(other, None, step)
            value.backward()
        base.step()
        assert float(value.detach()) == got.losses[step]
    assert_same_bits(got.parameters, [p.detach() for p in other.parameters()])


def test_a_window_of_one_and_a_closure_without_batched_calls_use_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self)))
    run(Scene(), window=1)
    run(Scene(), score=target_without_gradient)
    assert not started
    run(Scene())
    assert started


@torch.no_grad()
def target_without_gradient(x: Tensor, level: Tensor) -> Tensor:
    return target(x, level)


def test_networks_are_joined_to_rounding() -> None:
    """Kernels differ by shape: the same to rounding, not to the bit."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(SIZE, 512), nn.Tanh(), nn.Linear(512, SIZE)).double()

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view(2)
        return (scene.second(seen) - score(seen.detach())).square().mean()

    got = run(Scene(), loss, batched(network))
    with slot_by_slot():
        expected = run(Scene(), loss, batched(network))
    assert got.stats.joined_calls > 3
    torch.testing.assert_close(got.parameters, expected.parameters, rtol=1e-9, atol=1e-12)


def test_two_functions_and_one_inside_of_another() -> None:
    inner, calls = batched(torch.sin), []

    @batched
    def outer(x: Tensor, level: Tensor) -> Tensor:
        calls.append(threading.current_thread())
        return inner(x) * level  # type: ignore[no-any-return]

    other = batched(lambda x, scale=1.0: x * scale)

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        # By turns, so that slots ask for different functions at once.
        seen = scene.view()
        first = (
            outer(seen.detach(), torch.rand(3, 1)) if step % 2 else other(seen.detach(), scale=2.0)
        )
        second = other(first, scale=0.5)
        return (scene.second(seen) - second).square().mean()

    both(Scene, loss)
    assert set(calls) == {threading.main_thread()}


def test_keywords_are_shared_and_equal() -> None:
    table = torch.arange(4.0)

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view()
        # Equal content; two values by turns keep some slots apart.
        shared = {"table": table.clone(), "config": {"scale": 1.0 + step % 2}}
        return (scene.second(seen) - score(seen.detach(), **shared)).square().mean()

    def scaled(x: Tensor, *, table: Tensor, config: dict[str, float]) -> Tensor:
        return x * config["scale"] + table

    stats = both(Scene, loss, batched(scaled))
    assert stats.calls_saved < sum(record.slots - 1 for record in stats.records)


def test_keywords_that_always_differ_are_named_once() -> None:
    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view()
        levels = torch.rand(3, 1, dtype=torch.float64)
        return (scene.second(seen) - score(seen.detach(), level=levels)).square().mean()

    with pytest.warns(UserWarning, match=r"keyword arguments \(level\) differ") as caught:
        stats = run(Scene(), loss).stats
    assert len(caught) == 1
    assert stats.joined_calls == 0


def test_other_tolerances_and_a_step_of_another_optimizer_inside() -> None:
    """A closure that takes steps of its own: its inner calls are not the outer sweep's."""
    rows = set()

    @batched
    def own(x: Tensor, level: Tensor) -> Tensor:
        rows.add(len(x))
        return target(x, level)

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        inner = nn.Parameter(torch.zeros(3, SIZE, dtype=torch.float64))
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD([inner], lr=0.1),
            window=3,
            tolerance=StepRelativeTolerance(0.1),
            audit="always",  # so that it joins none of its own
        )
        seen = scene.view()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = (inner - own(inner.detach(), torch.rand(3, 1))).square().sum()
            value.backward()
            return value

        for _ in range(4):
            optimizer.step(closure)
        wanted = score(seen.detach(), torch.rand(3, 1))
        return (scene.second(seen) - wanted - inner.detach()).square().mean()

    both(Scene, loss, tolerance=AdaptiveTolerance(1e-3), window=3, steps=8, audit="never")
    assert rows == {3}


def test_autocast_and_other_settings_are_the_callers() -> None:
    """On the closure's own thread and where the function runs; casts of parameters are not kept over a pause."""
    seen_by: list[Any] = []

    def settings() -> Any:
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_device(),
            torch.get_num_threads(),
        )

    @batched
    def score(x: Tensor) -> Tensor:
        seen_by.append(settings())
        return x.float().sin()

    def loss(scene: Scene, _: Any, step: int) -> Tensor:
        seen_by.append(settings())
        # Casts that are kept until the block ends would be added up in another order.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            x = torch.randn(3, SIZE)
            hidden = torch.tanh(scene.first[0](x))
            wanted = score(hidden.detach())
            assert settings()[:2] == seen_by[-1][:2]
            again = scene.first[0](hidden)
        return (again.float() - wanted).square().mean()

    def make() -> Scene:
        return Scene().float()

    with torch.autocast("cpu", torch.float16, enabled=False), torch.device("cpu"):
        both(make, loss)
    assert {entry[3] for entry in seen_by} == {torch.get_num_threads()}
    assert (True, torch.bfloat16) in {entry[:2] for entry in seen_by}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        both(make, in_autocast_of_the_loop)


def in_autocast_of_the_loop(scene: Scene, score: Any, step: int) -> Tensor:
    assert torch.is_autocast_enabled("cpu")
    hidden = scene.first[0](torch.randn(3, SIZE))
    wanted = score(hidden.detach().float(), torch.rand(3, 1))
    return (scene.first[0](hidden).float() - wanted).square().mean()


def test_casts_of_parameters_do_not_outlive_their_values() -> None:
    """Autocast keeps them by tensor, and for all threads."""

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        linear, x = scene.first[0], torch.randn(3, SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = linear(x)
            wanted = score(hidden.detach().float(), torch.rand(3, 1))
            again = linear(x)
        assert torch.equal(again, hidden)
        by_hand = torch.nn.functional.linear(
            x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16()
        )
        assert torch.equal(by_hand, hidden)
        return (hidden.float() - wanted + again.float()).square().mean()

    stats = run(Scene().float(), loss).stats
    assert stats.joined_calls > 3
    assert stats.failed_speculations == 0


def test_arguments_that_are_views_of_parameters_are_the_slots_own() -> None:
    """Score distillation of a picture: the parameters themselves are what the function sees."""

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        weight = scene.first[0].weight
        wanted = score(weight.detach(), torch.rand(SIZE, 1))
        return (scene.second(scene.view()) ** 2).mean() + (weight - wanted).square().mean()

    both(Scene, loss)


def test_gradients_left_standing_are_still_found() -> None:
    """Clearing is tested in joined sweeps as in others."""
    scene, score = Scene(), batched(target)
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD(scene.parameters(), lr=0.01), window=4, tolerance=1.0
    )

    def closure(step: int) -> Tensor:
        if step < 12:
            optimizer.zero_grad()
        loss = one_call(scene, score, step)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"has a gradient in \.grad before step"):
        for _ in range(24):
            optimizer.step(closure)
    assert optimizer.stats.joined_calls > 0
