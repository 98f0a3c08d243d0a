"""The tiled rasterizer against a loop over pixels, and what it promises about bits, memory and time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes.gaussians import tile_lists, tile_table
from picardopt_3d.scenes.gaussians.harmonics import view_colours
from picardopt_3d.scenes.gaussians.projection import project
from picardopt_3d.scenes.gaussians.rasterize import Rasterized, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats
from picardopt_3d.scenes.gaussians.tiles import composite
from torch import Tensor

from tests.integrations.helpers.splats import leaves, loop_over_pixels, random_splats


def cameras(views: int, distance: float = 1.65) -> Cameras:
    return orbit_cameras(
        torch.linspace(-10, 40, views), torch.linspace(20, 200, views), distance
    ).to(torch.float64)


def whole(pictures: Rasterized) -> Tensor:
    return torch.cat([pictures.colour, pictures.opacity, pictures.depth], dim=1)


def gradients(pictures: Tensor, splats: Splats) -> list[Tensor]:
    """Gradients of a sum with random weights; 0 of what has no part in the pictures."""
    weights = torch.randn(
        pictures.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    loss = (pictures * weights.to(pictures)).sum() + sum(0 * tensor.sum() for tensor in splats)
    return list(torch.autograd.grad(loss, splats))


def assert_is_the_loops(
    splats: Splats, seen_by: Cameras, height: int, width: int, degree: int
) -> None:
    splats = leaves(splats)
    offsets = splats.means[None] - seen_by.position[:, None]
    colours = view_colours(splats.colours, splats.harmonics, offsets, degree)
    expected = loop_over_pixels(splats, colours, seen_by, height, width)
    found = whole(rasterize(splats, seen_by, height, width, degree=degree, rasterizer="torch"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    pairs = zip(gradients(found, splats), gradients(expected, splats), strict=True)
    for name, (ours, theirs) in zip(Splats._fields, pairs, strict=True):
        scale = float(theirs.abs().amax()) if theirs.numel() else 1.0
        close = torch.allclose(ours, theirs, rtol=1e-7, atol=1e-8 * max(scale, 1e-3))
        assert close, f"{name}: {ours} is not {theirs}"


@given(
    count=st.integers(1, 8),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    views=st.integers(1, 2),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.003, 0.03, 0.2, 3.0]),
    spread=st.sampled_from([0.0, 0.5, 1.5]),
    opacity=st.sampled_from([-4.0, 0.0, 3.0, 12.0]),
    degree=st.integers(0, 3),
    distance=st.sampled_from([0.4, 1.65]),
    tight=st.booleans(),
)
def test_pictures_and_gradients_are_those_of_a_loop_over_pixels(
    count: int,
    height: int,
    width: int,
    views: int,
    seed: int,
    scale: float,
    spread: float,
    opacity: float,
    degree: int,
    distance: float,
    tight: bool,
) -> None:
    """From outside and from among the Gaussians, where some are behind the camera; in one chunk and in many."""
    splats = random_splats(
        count, seed=seed, scale=scale, spread=spread, opacity=opacity, degree=degree
    )
    with pytest.MonkeyPatch.context() as patch:
        if tight:
            patch.setattr(tile_table, "_LONGEST", 2)
            patch.setattr(tile_table, "_ELEMENTS", 64)
            patch.setattr(tile_lists, "_PAIRS", 3)
        assert_is_the_loops(splats, cameras(views, distance), height, width, degree)


@pytest.mark.parametrize(("height", "width"), [(6, 52), (50, 5)])
def test_larger_pictures_have_larger_tiles(height: int, width: int) -> None:
    assert tile_lists.Grid(1, height, width).edge != tile_lists.Grid(1, 32, 32).edge
    splats = random_splats(12, scale=0.1, opacity=1.0)
    assert_is_the_loops(splats, cameras(1), height, width, 0)


def test_what_is_behind_opaque_gaussians_is_left_out() -> None:
    """Many opaque layers: the loop stops where nothing of a pixel is left, and so do blocks of Gaussians."""
    splats = random_splats(40, scale=0.2, opacity=9.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_table, "_LONGEST", 4)
        assert_is_the_loops(splats, cameras(2), 7, 6, 0)


def test_nothing_covers_a_pixel_wholly() -> None:
    """Where alpha is held at its largest value, it has no gradient."""
    splats = random_splats(2, scale=3.0, spread=0.1)
    splats.opacity_logits.copy_(torch.tensor([8.0, 0.0]))
    assert float(rasterize(splats, cameras(1), 9, 9, degree=0).opacity.amax()) < 0.9996
    assert_is_the_loops(splats, cameras(1), 9, 9, 0)


def test_what_is_hidden_has_no_gradient() -> None:
    """Not even one of rounding."""
    splats = random_splats(40, scale=0.05, dtype=torch.float32)
    walls = random_splats(2, scale=3.0, spread=0.0, dtype=torch.float32)
    walls.opacity_logits.fill_(9.0)
    seen_by = orbit_cameras(0.0, 0.0)  # on the x axis
    walls.means.copy_(torch.tensor([[0.8, 0.0, 0.0], [0.9, 0.0, 0.0]]))
    both = leaves(Splats(*map(torch.cat, zip(splats, walls, strict=True))))
    found = gradients(whole(rasterize(both, seen_by, 16, 16, degree=0)), both)
    for name, gradient in zip(Splats._fields, found, strict=True):
        assert not gradient[:40].any(), name
    assert found[4][40:].any()


def test_gradcheck() -> None:
    splats = leaves(random_splats(5, scale=0.15, degree=2, seed=3))
    seen_by = cameras(2)

    def pictures(*tensors: Tensor) -> Tensor:
        return whole(rasterize(Splats(*tensors), seen_by, 6, 5, degree=2))

    assert torch.autograd.gradcheck(pictures, tuple(splats), eps=1e-7, atol=1e-5)


def test_the_gradient_of_centres_on_the_screen_reaches_a_hook() -> None:
    splats, seen_by = leaves(random_splats(6, scale=0.1)), cameras(2)
    pictures = rasterize(splats, seen_by, 9, 12, degree=0)
    received: list[Tensor] = []
    pictures.means2d.register_hook(received.append)
    (pictures.colour.square().sum() + pictures.depth.sum()).backward()
    [gradient] = received

    with torch.no_grad():
        opacities = torch.sigmoid(splats.opacity_logits)
        projected = project(splats, opacities, seen_by, 9, 12)
        offsets = splats.means[None] - seen_by.position[:, None]
        colours = view_colours(splats.colours, splats.harmonics, offsets, 0)
        features = torch.cat([colours, offsets.norm(dim=-1, keepdim=True)], dim=-1)

        def loss(means2d: Tensor) -> Tensor:
            found = composite(
                projected._replace(means2d=means2d), opacities, features, height=9, width=12
            )
            return found[:, :3].square().sum() + found[:, 3:].sum()

        for view, row, axis in [(0, 1, 0), (0, 4, 1), (1, 0, 0), (1, 5, 1)]:
            step = torch.zeros_like(projected.means2d)
            step[view, row, axis] = 1e-6
            slope = loss(projected.means2d + step) - loss(projected.means2d - step)
            assert gradient[view, row, axis] == pytest.approx(float(slope) / 2e-6, rel=1e-4)


def test_the_same_input_gives_the_same_bits() -> None:
    splats = leaves(random_splats(800, dtype=torch.float32))
    seen_by = cameras(2)
    first = whole(rasterize(splats, seen_by, 40, 33, degree=0))
    kept = gradients(first, splats)
    for _ in range(5):
        again = whole(rasterize(splats, seen_by, 40, 33, degree=0))
        assert torch.equal(first, again)
        assert all(map(torch.equal, kept, gradients(again, splats)))


def test_a_view_does_not_depend_on_the_others() -> None:
    """But for rounding: lists of tiles are padded to other lengths."""
    splats, seen_by = random_splats(300, dtype=torch.float32), cameras(4)
    together = whole(rasterize(splats, seen_by, 24, 24, degree=0))
    for view in range(4):
        alone = whole(rasterize(splats, seen_by[view : view + 1], 24, 24, degree=0))
        torch.testing.assert_close(together[view : view + 1], alone, rtol=1e-5, atol=2e-6)


def test_single_precision_is_enough() -> None:
    single = random_splats(1000, scale=0.03, dtype=torch.float32)
    double = leaves(Splats(*(tensor.double() for tensor in single)))
    single = leaves(single)
    expected = whole(rasterize(double, cameras(1), 64, 64, degree=0))
    found = whole(rasterize(single, cameras(1), 64, 64, degree=0))
    difference = (found - expected).detach().abs()
    assert float(difference.mean()) < 1e-6
    # A Gaussian at the edge of what counts (1/255) may count in one of them only.
    assert float(difference.amax()) < 0.005
    for ours, theirs in zip(
        gradients(found, single)[:5], gradients(expected, double)[:5], strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_between_the_passes_little_is_kept() -> None:
    count, size = 500, 96
    splats = leaves(random_splats(count, scale=0.1, dtype=torch.float32))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pictures = rasterize(splats, cameras(1), size, size, degree=0)
    keep(pictures.colour.grad_fn.next_functions[0][0].table.values)  # type: ignore[union-attr]
    assert sum(kept.values()) < 4 * count * size * size / 4


GROWTH = """
import resource, torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.gaussians.rasterize import rasterize
from tests.integrations.helpers.splats import leaves, random_splats

torch.set_num_threads(1)
splats = leaves(random_splats(400, scale=0.1, opacity=-4.0, dtype=torch.float32))
for size in (128, 512):
    pictures = rasterize(splats, orbit_cameras(15.0, 20.0), size, size, degree=0)
    (pictures.colour.sum() + pictures.depth.sum()).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_tiles() -> None:
    """16 times the tiles: 400 MB for one number per Gaussian and pixel, a few of the pictures' size here."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 120, f"{small} MB, then {large} MB"


def test_two_thousand_gaussians_take_milliseconds() -> None:
    """Forward and backward, 64 pixels, one core: 15 ms here; with room for slower machines, and CPU time only."""
    splats = leaves(random_splats(2000, scale=0.025, spread=0.2, dtype=torch.float32))
    seen_by = cameras(1)
    spent = []
    for _ in range(8):
        begun = time.process_time()
        pictures = rasterize(splats, seen_by, 64, 64, degree=0)
        (pictures.colour.sum() + pictures.opacity.sum() + pictures.depth.sum()).backward()
        spent.append(time.process_time() - begun)
    assert min(spent) < 0.08
