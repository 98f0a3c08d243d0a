"""Law 4: whatever raises while a step is committed, everything stands before that step or behind it."""

import functools
import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import Carry, ParallelPicardOptimizer, Restructure, step_rng

STEPS, BAD = 8, 5
"""Of the run, and of the step whose commit goes wrong: in a window of 4 it is the head or lies ahead of one."""


FAILING: set[str] = set()
"""Where user code fails; not an attribute that the closure could see change."""


class Planted(Exception):
    """What user code raises in the middle of a commit."""


class Scene(nn.Module):
    """Some points, a statistic of them that a step rewrites, and a step that adds a point."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.points = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("extent", torch.zeros(3))
        self.base = torch.optim.Adam([self.points], lr=1e-2)

    def closure(self, step: int) -> dict[str, Tensor]:
        self.base.zero_grad()
        loss = (self.points * torch.randn(3) - self.extent).square().mean()
        loss.backward()
        return {"loss": loss, "extent": self.points.detach().abs().amax(dim=0)}

    def update(self, returned: dict[str, Tensor]) -> None:
        self.extent.lerp_(returned["extent"], 0.5)
        self.fail("update")

    def fail(self, where: str) -> None:
        if where in FAILING:
            if where == "signal":
                signal.raise_signal(signal.SIGUSR1)
            else:
                raise Planted(where)

    def densify(self, step: int) -> None:
        old, state = self.points, self.base.state.pop(self.points)
        self.points = nn.Parameter(torch.cat([old.detach(), torch.rand(1, 3)]))
        self.extent = torch.zeros_like(self.extent) + self.extent.flip(0)
        self.base.param_groups[0]["params"] = [self.points]
        self.fail("restructure")
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.cat([state[key], torch.zeros(1, 3)])
        self.base.state[self.points] = state


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    FAILING.clear()
    yield
    FAILING.clear()


def due(step: int) -> bool:
    return step == BAD


def picture(scene: Scene, optimizer: Any = None) -> dict[str, Any]:
    """Everything that must be whole, copied."""
    state = scene.base.state_dict()["state"]
    seen = {
        "points": scene.points.detach().clone(),
        "held": scene.base.param_groups[0]["params"][0] is scene.points,
        "extent": scene.extent.clone(),
        "state": {k: v.clone() for part in state.values() for k, v in part.items()},
    }
    if optimizer is not None:
        grad = scene.points.grad
        seen["grad"] = None if grad is None else grad.clone()
        seen["step_index"], seen["steps"] = optimizer.step_index, optimizer.stats.steps
    return seen


def assert_same(got: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected), path
        for key in expected:
            assert_same(got[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected), path
    else:
        assert got == expected, path


def sequential(restructures: bool) -> list[dict[str, Any]]:
    scene, pictures = Scene(), []
    for step in range(STEPS):
        with step_rng(0, step):
            returned = scene.closure(step)
            scene.base.step()
            scene.update({name: value.detach() for name, value in returned.items()})
            if restructures and due(step):
                scene.densify(step)
        pictures.append(picture(scene))
    return pictures


@contextmanager
def handled(handler: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def make(window: int, tolerance: float, restructures: bool) -> tuple[Scene, Any]:
    scene = Scene()
    optimizer = ParallelPicardOptimizer(
        scene.base,
        window=window,
        tolerance=tolerance,
        carry=Carry(scene, scene.update),
        restructure=Restructure(scene.densify, due) if restructures else None,
    )
    return scene, optimizer


def hooked(scene: Scene, where: str) -> None:
    def hook(*args: Any) -> None:
        scene.fail(where)

    if where == "before the step":
        scene.base.register_step_pre_hook(hook)
    elif where in ("behind the step", "signal"):
        scene.base.register_step_post_hook(hook)


@pytest.mark.parametrize("tolerance", [0, 1e3])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("where", ["update", "before the step", "behind the step", "restructure"])
def test_a_commit_that_raises_is_undone(where: str, window: int, tolerance: float) -> None:
    restructures = where == "restructure"
    scene, optimizer = make(window, tolerance, restructures)
    hooked(scene, where)
    for _ in range(BAD):
        optimizer.step(scene.closure)
    before, parameter = picture(scene, optimizer), scene.points
    FAILING.add(where)
    for _ in range(2):  # again and again the same
        with pytest.raises(Planted, match=where):
            optimizer.step(scene.closure)
        assert_same(picture(scene, optimizer), before)
        assert scene.points is parameter
    FAILING.clear()
    expected = sequential(restructures)
    for step in range(BAD, STEPS):
        optimizer.step(scene.closure)
        if tolerance == 0:
            assert_same(picture(scene), expected[step])
    assert optimizer.stats.steps == optimizer.step_index == STEPS
    assert len(scene.points) == 4 + restructures


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("where", ["behind the step", "restructure"])
def test_a_plain_step_that_raises_is_undone(where: str, window: int) -> None:
    restructures = where == "restructure"
    scene, optimizer = make(window, 0, restructures)
    hooked(scene, where)
    for _ in range(BAD):
        optimizer.step(scene.closure)
    FAILING.add(where)
    scene.closure(BAD)
    before = picture(scene, optimizer)
    with pytest.warns(UserWarning, match="plain step"), pytest.raises(Planted, match=where):
        optimizer.step()
    assert_same(picture(scene, optimizer), before)


@pytest.mark.parametrize("window", [1, 4])
def test_a_signal_in_a_commit_waits_until_it_is_whole(window: int) -> None:
    scene, optimizer = make(window, 0, False)
    hooked(scene, "signal")
    for _ in range(BAD):
        optimizer.step(scene.closure)

    def handler(*args: Any) -> None:
        raise Planted("signal")

    FAILING.add("signal")
    with handled(handler), pytest.raises(Planted, match="signal"):
        optimizer.step(scene.closure)
    FAILING.clear()
    expected = sequential(False)
    assert_same(picture(scene), expected[BAD])
    assert optimizer.step_index == optimizer.stats.steps == BAD + 1
    for step in range(BAD + 1, STEPS):
        optimizer.step(scene.closure)
        assert_same(picture(scene), expected[step])


def test_a_commit_without_user_code_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is paid for only where something besides the base's own step runs."""
    from picardopt.snapshot import Snapshot

    captures = []
    honest = Snapshot.capture
    monkeypatch.setattr(
        Snapshot, "capture", lambda self, *a, **k: (captures.append(self), honest(self, *a, **k))[1]
    )
    parameter = nn.Parameter(torch.ones(3))
    base = torch.optim.Adam([parameter])
    optimizer = ParallelPicardOptimizer(base, window=1)

    def closure() -> Tensor:
        base.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert captures == []
    base.register_step_post_hook(lambda *args: None)
    optimizer.step(closure)
    assert len(captures) == 1


class Pruner:
    """A restructuring function that is an object; it fails half way if it is told to."""

    def __init__(self, base: torch.optim.Optimizer, *, in_place: bool, fails: bool) -> None:
        self.base, self.in_place, self.fails = base, in_place, fails
        self.ages = torch.zeros(3)

    def __call__(self, step: int) -> None:
        group = self.base.param_groups[0]["params"]
        kept = group[0].detach()[:2].clone()
        self.ages = self.ages[:2]
        if self.in_place:
            group[0].data = kept
        else:
            self.base.state.pop(group[0])
            group[0] = nn.Parameter(kept)
        if self.fails:
            raise Planted("pruned")


def pruned(*, in_place: bool, fails: bool) -> tuple[Any, Pruner, Callable[[], Tensor]]:
    base = torch.optim.SGD([nn.Parameter(torch.ones(3, 2))], lr=0.1, momentum=0.9)
    pruner = Pruner(base, in_place=in_place, fails=fails)
    restructure = Restructure(pruner, lambda step: step == 1)
    optimizer = ParallelPicardOptimizer(base, window=4, tolerance=0, restructure=restructure)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = base.param_groups[0]["params"][0].square().sum()
        loss.backward()
        return loss

    return optimizer, pruner, closure


@pytest.mark.parametrize("in_place", [False, True])
def test_an_object_that_restructures_is_put_back_too(in_place: bool) -> None:
    optimizer, pruner, closure = pruned(in_place=in_place, fails=True)
    optimizer.step(closure)
    parameter = optimizer.param_groups[0]["params"][0]
    values = parameter.detach().clone()
    for _ in range(2):
        with pytest.raises(Planted, match="pruned"):
            optimizer.step(closure)
        assert optimizer.param_groups[0]["params"][0] is parameter
        assert torch.equal(parameter, values)
        assert len(pruner.ages) == 3
    assert optimizer.step_index == 1


def test_what_a_restructuring_step_replaced_is_freed() -> None:
    optimizer, _, closure = pruned(in_place=False, fails=False)
    old = weakref.ref(optimizer.param_groups[0]["params"][0])
    for _ in range(3):
        optimizer.step(closure)
    gc.collect()
    assert old() is None


def test_a_plain_steps_update_builds_no_graph() -> None:
    """As in a step that ran ahead, the update may read the parameters."""
    parameter, average = nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        window=2,
        carry=Carry([average], lambda _: average.lerp_(parameter, 0.5)),
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    def _wrap_closure(model: Any, optimizer: Any, closure: Callable[[], Any]) -> Any:
        return closure()

    _wrap_closure.__module__ = "lightning.pytorch.plugins.precision"
    automatic = SimpleNamespace(automatic_optimization=True)
    with pytest.warns(UserWarning, match="automatic optimization"):
        optimizer.step(functools.partial(_wrap_closure, automatic, optimizer, closure))
    assert not average.requires_grad
    assert torch.equal(average, parameter.detach() * 0.5)
