from __future__ import annotations

import pytest
import torch
from picardopt_3d.cameras import random_cameras
from picardopt_3d.scenes import (
    HashConfig,
    NerfConfig,
    NerfField,
    OccupancyConfig,
    OccupancyGrid,
    build_scene,
)

from picardopt import Carry, ParallelPicardOptimizer, step_rng
from tests.helpers.problems import quantize

RADIUS = 0.5
STEPS = 12


def test_a_new_grid_holds_everything_and_a_measurement_decides() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=4, threshold=0.01), RADIUS)
    assert grid.occupied().all()
    measured = grid.measure(lambda points: (points[:, 0] > 0).float())  # x decides
    grid.update(measured)
    occupied = grid.occupied()
    assert occupied[:, :, 2:].all()
    assert not occupied[:, :, :2].any()
    points = torch.tensor([[0.3, -0.2, 0.4], [-0.3, 0.2, 0.4], [9.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
    assert grid.at(points).tolist() == [True, False, True, False]
    assert grid.at(points.view(2, 2, 3)).tolist() == [[True, False], [True, False]]


def test_points_find_the_cells_they_were_measured_in() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=5), RADIUS)
    seen = []

    def density(points: torch.Tensor) -> torch.Tensor:
        seen.append(points)
        return torch.arange(len(points)).float()

    values = grid.measure(density)
    for index in (0, 7, 58, 124):
        grid.values.zero_()
        grid.values.view(-1)[index] = 1.0
        found = grid.at(seen[0]).nonzero().flatten().tolist()
        assert found == [index]
        assert values.view(-1)[index] == index
    assert seen[0].abs().max() <= RADIUS


def test_old_numbers_decay_and_the_larger_one_is_kept() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=2, decay=0.5), RADIUS)
    grid.update(torch.full((2, 2, 2), 4.0))
    grid.update(torch.full((2, 2, 2), 1.0))
    assert grid.values.unique().tolist() == [2.0]
    grid.update(torch.full((2, 2, 2), 3.0))
    assert grid.values.unique().tolist() == [3.0]


def test_the_threshold_is_the_mean_where_that_is_less() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=2, threshold=1.0), RADIUS)
    values = torch.tensor([0.0, 0.1, 0.2, 0.5]).repeat(2).view(2, 2, 2)  # mean 0.2
    grid.values.copy_(values)
    assert torch.equal(grid.occupied(), values > 0.2)
    grid.values.copy_(10 * values)  # mean 2
    assert torch.equal(grid.occupied(), 10 * values > 1)


def test_which_steps_measure() -> None:
    grid = OccupancyGrid(OccupancyConfig(resolution=2, every=4))
    assert [step for step in range(10) if grid.due(step)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"resolution": 0}, "resolution"),
        ({"every": 0}, "every"),
        ({"threshold": -1.0}, "threshold"),
        ({"decay": 1.5}, "decay"),
    ],
)
def test_what_keeps_no_grid_is_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        OccupancyConfig(**options)


CONFIG = NerfConfig(
    encoding=HashConfig(levels=3, base=3, scale=1.8, log2_size=7),
    width=8,
    radius=0.55,
    samples=8,
    background="solid",
    occupancy=OccupancyConfig(resolution=6, threshold=2.0, decay=0.5, every=3),
)


class Run:
    """A scene whose samples are culled by a grid that its own steps keep."""

    def __init__(self, cell: float | None) -> None:
        torch.manual_seed(0)
        self.scene = build_scene(CONFIG)
        assert isinstance(self.scene, NerfField)
        assert self.scene.occupancy is not None
        self.grid, self.cell = self.scene.occupancy, cell
        # With quantized parameters drifts repeat, so that guesses can be right to the bit.
        parameters = [p for group in self.scene.groups().values() for p in group]
        self.base: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, 0.01)
            if cell is None
            else torch.optim.SGD(parameters, 1e-3)
        )

    def closure(self, step: int) -> dict[str, torch.Tensor]:
        self.base.zero_grad()
        rays = random_cameras(2).rays(8, 8)
        values = dict(self.scene.named_parameters())
        if self.cell is not None:
            values = {name: quantize(value, self.cell) for name, value in values.items()}
        render = torch.func.functional_call(Rendering(self.scene), prefixed(values), rays)
        returned = {"loss": (render - 0.3).square().mean()}
        returned["loss"].backward()
        if self.grid.due(step):
            returned["occupancy"] = self.grid.measure(self.scene.density)
        return returned

    def update(self, returned: dict[str, torch.Tensor]) -> None:
        if "occupancy" in returned:
            self.grid.update(returned["occupancy"])

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.scene.state_dict().items()}


class Rendering(torch.nn.Module):
    """Calls `render` through `forward`, for `functional_call`."""

    def __init__(self, scene: torch.nn.Module) -> None:
        super().__init__()
        self.scene = scene

    def forward(self, origins: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        return self.scene.render_rays(origins, directions, jitter=True).rgb


def prefixed(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"scene.{name}": value for name, value in values.items()}


def sequential(cell: float | None) -> list[dict[str, torch.Tensor]]:
    run, states = Run(cell), []
    for step in range(STEPS):
        with step_rng(0, step):
            returned = run.closure(step)
            run.base.step()
            run.update(returned)
        states.append(run.state() | {"loss": returned["loss"].detach()})
    return states


@pytest.mark.parametrize("cell", [None, 0.25], ids=["Adam", "quantized"])
def test_a_run_that_culls_is_bitwise_the_sequential_one(cell: float | None) -> None:
    expected = sequential(cell)
    occupied = {int((state["occupancy.values"] > 2.0).sum()) for state in expected}
    assert len(occupied) > 1  # the grid moves, and with it what is rendered
    run = Run(cell)
    optimizer = ParallelPicardOptimizer(
        run.base, window=4, tolerance=0, seed=0, carry=Carry([run.grid.values], run.update)
    )
    for step in range(STEPS):
        returned = optimizer.step(run.closure)
        state = run.state() | {"loss": returned["loss"]}
        assert all(torch.equal(state[name], value) for name, value in expected[step].items())
    if cell is not None:
        assert max(optimizer.stats.strides) > 1
        assert optimizer.stats.sweeps < STEPS
