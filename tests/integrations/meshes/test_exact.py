"""Meshes in the fixed point: a grid's changes at each step, and no bit differs from sequential steps."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import random_cameras
from picardopt_3d.methods.lighting import random_background
from picardopt_3d.scenes import Light, Scene, Tetrahedral, TexturedMesh, TexturedMeshConfig
from picardopt_3d.scenes.mesh import tetrahedral
from picardopt_3d.scenes.mesh.geometry import laplacian, normal_consistency
from picardopt_3d.scenes.mesh.marching import march
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import unwrap
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from picardopt import ParallelPicardOptimizer, step_rng
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.tetrahedra import rugged
from tests.integrations.helpers.textures import bumpy

STEPS, SEED = 12, 5


class Pulled:
    """A scene whose colours, normals, silhouettes, consistency of normals and Laplacian are all in the loss.

    Args:
        now_and_then: Whether only every fourth step moves anything, so that guesses between are right to the bit.
        textured: Whether it is a textured mesh, and no grid.
    """

    def __init__(self, now_and_then: bool, textured: bool = False) -> None:
        self.scene: Scene = textured_ball() if textured else rugged(7, background="neural")
        slow = 0.01 if textured else 1.0  # its offsets are world units
        self.base: torch.optim.Optimizer
        if now_and_then:
            self.base = torch.optim.SGD(self.scene.parameters(), 30.0 * slow)
        else:
            self.base = torch.optim.Adam(self.scene.parameters(), 0.15 * slow)
        self.scheduler = LambdaLR(self.base, lambda t: float(t % 4 == 3 or not now_and_then))
        self.vertices: list[int] = []

    def closure(self, step: int) -> Tensor:
        self.base.zero_grad()
        cameras = random_cameras(2)
        render = self.scene.render(
            cameras,
            10,
            jitter=True,
            normals=True,
            light=Light(cameras.position + torch.randn(2, 3), 0.3, 0.7),
            background=random_background(2, 0.5, cameras.fov.device),
            step=step,
        )
        assert render.normal is not None
        assert render.triangles is not None
        self.vertices.append(len(render.triangles.vertices))
        loss = (
            (render.rgb - torch.rand(2, 3, 1, 1)).square().mean()
            + (render.opacity - 0.4 * torch.rand(2, 1, 1, 1)).square().mean()
            + (render.normal - torch.randn(2, 3, 1, 1)).square().mean()
            + normal_consistency(render.triangles)
            + laplacian(render.triangles)
        )
        loss.backward()
        return loss

    def state(self) -> Any:
        return copy.deepcopy((dict(self.scene.state_dict()), self.base.state_dict()))


def textured_ball() -> TexturedMesh:
    """Of few triangles, whose pixels are means of four."""
    triangles = bumpy(5)
    colours = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
    config = TexturedMeshConfig(texture=16, samples=2, trained="all")
    return TexturedMesh(config, triangles, unwrap(triangles, 16), colours)


def steps(pulled: Pulled, step: Callable[[int], Tensor]) -> list[Any]:
    """Losses and states after each step."""
    trace = []
    for t in range(STEPS):
        loss = step(t).detach().clone()
        pulled.scheduler.step()
        trace.append((loss, pulled.state()))
    return trace


def in_order(now_and_then: bool, textured: bool = False) -> tuple[list[Any], list[int]]:
    """Law 1: for every step, under its randomness, the gradient and the base's step."""
    pulled = Pulled(now_and_then, textured)

    def step(t: int) -> Tensor:
        with step_rng(SEED, t):
            loss = pulled.closure(t)
            pulled.base.step()
        return loss

    return steps(pulled, step), pulled.vertices


@functools.cache
def expected(now_and_then: bool, textured: bool = False) -> tuple[list[Any], list[int]]:
    return in_order(now_and_then, textured)


def ahead(now_and_then: bool, window: int, textured: bool = False) -> tuple[list[Any], list[int]]:
    """The same steps, run ahead; the trace and the strides."""
    pulled = Pulled(now_and_then, textured)
    optimizer = ParallelPicardOptimizer(
        pulled.base,
        window=window,
        tolerance=0,
        lr_scheduler=pulled.scheduler,
        total_steps=STEPS,
        seed=SEED,
    )
    trace = steps(pulled, lambda t: optimizer.step(pulled.closure))
    return trace, list(optimizer.stats.strides)


@contextmanager
def late(calls_before_it_is_made: int = 1) -> Iterator[None]:
    """The fault: the signs of an earlier call decide which triangles there are, as in a mesh that is kept."""
    kept: list[Tensor] = []

    def stale(positions: Tensor, distance: Tensor, resolution: int) -> Triangles:
        kept.append(distance.detach())
        before = kept.pop(0) if len(kept) > calls_before_it_is_made else kept[0]
        return march(positions, torch.copysign(distance.abs(), before), resolution)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tetrahedral, "march", stale)
        yield


def changes(counts: Iterable[int]) -> int:
    found = list(counts)
    return sum(a != b for a, b in itertools.pairwise(found))


def test_the_mesh_changes_and_the_parameters_do_not() -> None:
    trace, vertices = expected(False)
    assert changes(vertices) > STEPS // 2
    shapes = [{name: value.shape for name, value in state[0].items()} for _, state in trace]
    assert all(shape == shapes[0] for shape in shapes)
    assert changes(expected(True)[1]) == 2  # after steps 3 and 7; the last step is not drawn
    for name, value in trace[-1][1][0].items():
        moved = not torch.equal(value, trace[0][1][0][name])
        assert moved == (name not in ("centre", "cell")), name


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("now_and_then", [False, True])
def test_bitwise_after_every_step(now_and_then: bool, window: int) -> None:
    trace, _ = expected(now_and_then)
    got, strides = ahead(now_and_then, window)
    assert_same_bits(got, trace)
    assert not now_and_then or max(strides) == min(window, 4)


@pytest.mark.parametrize("now_and_then", [False, True])
def test_bitwise_on_two_processes(pools: Pools, now_and_then: bool) -> None:
    trace, _ = expected(now_and_then)
    for got, strides in pools(2).run(ahead, now_and_then, 4):
        assert_same_bits(got, trace)
        assert not now_and_then or max(strides) == 4


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("now_and_then", [False, True])
def test_a_textured_mesh_is_bitwise_after_every_step(now_and_then: bool, window: int) -> None:
    trace, _ = expected(now_and_then, True)
    moved = {
        name
        for name, value in trace[-1][1][0].items()
        if not torch.equal(value, trace[0][1][0][name])
    }
    assert moved == {"texture", "offsets"}
    got, strides = ahead(now_and_then, window, True)
    assert_same_bits(got, trace)
    assert not now_and_then or max(strides) == window


def test_a_textured_mesh_is_bitwise_on_two_processes(pools: Pools) -> None:
    trace, _ = expected(False, True)
    for got, _ in pools(2).run(ahead, False, 4, True):
        assert_same_bits(got, trace)


@pytest.mark.parametrize("now_and_then", [False, True])
def test_a_mesh_kept_from_the_call_before_is_found_out(now_and_then: bool) -> None:
    with late():
        trace, _ = in_order(now_and_then)
        got = ahead_without_audit(now_and_then)
    with pytest.raises(AssertionError):
        assert_same_bits(got, trace)


def ahead_without_audit(now_and_then: bool) -> list[Any]:
    """The trace of a run whose closure is not checked for being a function of the step."""
    pulled = Pulled(now_and_then)
    optimizer = ParallelPicardOptimizer(
        pulled.base,
        window=4,
        tolerance=0,
        lr_scheduler=pulled.scheduler,
        total_steps=STEPS,
        seed=SEED,
        audit="never",
    )
    return steps(pulled, lambda t: optimizer.step(pulled.closure))


def test_a_scene_of_the_same_parameters_draws_the_same_bits() -> None:
    """Whatever it drew before."""
    used, fresh = rugged(7), rugged(7, seed=1)
    cameras = random_cameras(2)
    for _ in range(2):
        used.render(cameras, 8)
        with torch.no_grad():
            used.distance.add_(0.1)
    fresh.load_state_dict(used.state_dict())
    assert isinstance(fresh, Tetrahedral)
    assert torch.equal(
        used.render(cameras, 8, normals=True).rgb, fresh.render(cameras, 8, normals=True).rgb
    )
