from __future__ import annotations

import itertools

import pytest
import torch
from picardopt_3d.scenes import HashConfig, HashGrid

MIXED = HashConfig(levels=4, base=2, scale=1.9, log2_size=6)  # two levels dense, two hashed
RADIUS = 0.7


def grid_of(config: HashConfig = MIXED, trained: bool = False) -> HashGrid:
    grid = HashGrid(config, RADIUS).double()
    grid.requires_grad_(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        grid.table.copy_(torch.randn(grid.table.shape, generator=generator))
    return grid


def points_of(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1) * RADIUS


def naive(grid: HashGrid, point: list[float]) -> list[float]:
    """Instant-NGP, section 3, one point and one corner at a time, in Python's own numbers."""
    config, features, offset = grid.config, [], 0
    for cells in config.resolutions:
        place = [(value / grid.radius + 1) / 2 * cells for value in point]
        low = [min(int(value), cells - 1) for value in place]
        vertices = (cells + 1) ** 3
        size = min(vertices, 2**config.log2_size)
        total = [0.0] * config.features
        for corner in itertools.product((0, 1), repeat=3):
            x, y, z = (a + b for a, b in zip(low, corner, strict=True))
            if vertices <= size:
                entry = (z * (cells + 1) + y) * (cells + 1) + x
            else:
                entry = ((x * 1) ^ (y * 2654435761) ^ (z * 805459861)) % size
            weight = 1.0
            for value, a, b in zip(place, low, corner, strict=True):
                weight *= value - a if b else 1 - (value - a)
            for row in range(config.features):
                total[row] += weight * grid.table[row, offset + entry].item()
        features += total
        offset += size
    return features


@pytest.mark.parametrize("features", [1, 2, 3])
def test_features_are_those_of_a_loop_over_points(features: int) -> None:
    grid = grid_of(HashConfig(levels=4, features=features, base=2, scale=1.9, log2_size=6))
    assert [level.hashed for level in grid.levels] == [False, False, True, True]
    points = points_of(12)
    expected = torch.tensor([naive(grid, point) for point in points.tolist()]).T
    assert grid(points)[0] == pytest.approx(expected.numpy(), abs=1e-6)


def test_resolutions_are_those_of_the_papers() -> None:
    resolutions = HashConfig().resolutions
    assert resolutions[0] == 16
    assert resolutions[-1] == int(16 * 1.4473**15)
    assert HashConfig(levels=3, base=7, scale=3).resolutions == (7, 21, 63)


def test_points_outside_take_what_is_on_the_faces() -> None:
    grid = grid_of()
    outside = torch.tensor([[2.0, 0.1, -0.3], [0.2, -5.0, 9.0]], dtype=torch.float64)
    on_faces = outside.clamp(-RADIUS, RADIUS)
    assert torch.allclose(grid(outside)[0], grid(on_faces)[0], atol=1e-12)


def test_slopes_are_those_of_finite_differences() -> None:
    grid, points, size = grid_of(), points_of(50), 1e-7
    slopes = grid(points, slopes=True)[1]
    assert slopes is not None
    for axis in range(3):
        offset = size * torch.eye(3, dtype=torch.float64)[axis]
        expected = (grid(points + offset)[0] - grid(points - offset)[0]) / (2 * size)
        assert slopes[axis] == pytest.approx(expected.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("slopes", [False, True])
def test_gradients_are_those_of_finite_differences(slopes: bool) -> None:
    grid, points = grid_of(HashConfig(levels=2, base=1, scale=3, log2_size=4)), points_of(4)

    def encode(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch.func.functional_call(grid, {"table": table}, (points,), {"slopes": slopes})
        return tuple(part for part in out if part is not None)

    assert torch.autograd.gradcheck(encode, (grid.table.detach().clone().requires_grad_(),))


def test_features_are_the_same_with_and_without_slopes_and_gradients_repeat_to_the_bit() -> None:
    grid = grid_of(trained=True).float()
    points = points_of(2000).float()
    assert torch.equal(grid(points)[0], grid(points, slopes=True)[0])
    gradients = []
    for _ in range(2):
        grid.zero_grad()
        grid(points)[0].square().sum().backward()
        gradients.append(grid.table.grad.clone())
    assert torch.equal(*gradients)


def test_a_fresh_table_is_small_and_not_constant() -> None:
    table = HashGrid(MIXED).table.detach()
    assert 0.9e-4 < table.abs().max() <= 1e-4
    assert table.std() == pytest.approx(1e-4 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("step", "bands"),
    [(0, 2), (199, 2), (200, 2), (249, 2), (250, 3), (300, 4), (9999, 4), (None, 4)],
)
def test_levels_come_in_one_by_one(step: int | None, bands: int) -> None:
    grid = grid_of(HashConfig(4, 2, 6, 2, 1.9, start_level=2, every=50, after=200), True)
    assert grid.bands(step) == bands
    features, slopes = grid(points_of(5), step, slopes=True)
    assert slopes is not None
    assert features[: 2 * bands].abs().min() > 0
    assert not features[2 * bands :].any()
    assert not slopes[:, 2 * bands :].any()
    assert torch.equal(features[: 2 * bands], grid(points_of(5))[0][: 2 * bands])
    features.sum().backward()
    first_left_out = grid.levels[bands].offset if bands < 4 else grid.table.shape[1]
    assert grid.table.grad is not None
    assert not grid.table.grad[:, first_left_out:].any()
    assert grid.table.grad[:, :first_left_out].any()


def test_the_papers_bands() -> None:
    grid = HashGrid(HashConfig(log2_size=2, start_level=8))
    assert [grid.bands(step) for step in (0, 2000, 2499, 2500, 3000, 6000)] == [8, 8, 8, 9, 10, 16]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"levels": 0}, "levels"),
        ({"features": 0}, "features"),
        ({"log2_size": 0}, "log2_size"),
        ({"base": 0}, "base"),
        ({"scale": 0.5}, "scale"),
        ({"start_level": 17}, "start_level"),
        ({"every": 0}, "every"),
        ({"after": -1}, "after"),
    ],
)
def test_shapes_that_hold_nothing_are_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        HashConfig(**options)
