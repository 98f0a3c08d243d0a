"""What `benchmarks/paper_memory.py` measures, and what it makes of the figures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from picardopt_3d.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("paper_memory", "paper_stages", "paper_steps", "full_size_models", "tables")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import paper_memory

    return paper_memory


@pytest.fixture
def steps(memory: ModuleType) -> ModuleType:
    import paper_steps

    return paper_steps


def rows_of(memory: ModuleType) -> dict[str, Any]:
    return {row.name: row for row in memory.paper_rows()}


def test_every_stage_of_every_paper_preset_is_a_row(memory: ModuleType) -> None:
    stages = [
        stage.config
        for methods in METHODS.values()
        for entry in methods.values()
        for preset, recipe in entry.presets.items()
        if preset.startswith("paper")
        for stage in recipe.stages()
    ]
    rows = list(memory.paper_rows())
    assert [row.config for row in rows] == stages
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("name", "views", "pixels"),
    [
        ("dreamfusion", (16, 64), 16 * 64**2),
        ("prolificdreamer/nerf", (2, 512), 2 * 512**2),
        ("zero123 (picture)", (10, 256), 10 * 256**2 + 512**2),
        ("dreamgaussian/gaussians (picture)", (16, 512), 16 * 512**2 + 256**2),
    ],
)
def test_the_largest_step_is_the_one_with_most_pixels(
    memory: ModuleType, name: str, views: tuple[int, int], pixels: int
) -> None:
    row = rows_of(memory)[name]
    step = row.largest()
    assert (row.views(step), row.pixels_at(step)) == (views, pixels)
    assert all(row.pixels_at(other) <= pixels for other in range(0, row.config.steps, 50))


def test_a_line_through_two_sizes_is_followed_to_the_pixels_of_a_step(memory: ModuleType) -> None:
    each = [{"both": 100.0}, {"both": 700.0}]
    assert memory.extrapolated([10, 40], each, 1040) == 100 + 20 * 1030
    falling = [{"both": 700.0}, {"both": 100.0}]
    assert memory.extrapolated([10, 40], falling, 1040) == 100  # less than nothing a pixel is noise


def test_each_device_writes_its_own_section(memory: ModuleType, tmp_path: Path) -> None:
    out, (cpu, gpu) = tmp_path / "r.md", memory.TITLES.values()
    one = memory.section(gpu, "notes", "command", "where", "| gpu |")
    out.write_text(memory.replaced(out, gpu, one))
    assert f"## {cpu}\n\nNot measured." in out.read_text()
    two = memory.section(cpu, "notes", "command", "where", "| cpu |")
    out.write_text(memory.replaced(out, cpu, two))
    again = out.read_text()
    assert [again.count(part) for part in ("| gpu |", "| cpu |", "Not measured.")] == [1, 1, 0]
    assert again.index("| cpu |") < again.index("| gpu |")


def test_the_peak_of_a_call_is_that_of_what_it_allocates(steps: ModuleType) -> None:
    device, count = torch.device("cpu"), 1 << 24
    before = steps.reset_peak(device)
    torch.ones(count)
    assert steps.peak(device) - before == pytest.approx(4 * count, rel=0.1)
    assert steps.reset_peak(device) - before < count  # given back


def test_a_grown_field_samples_a_ball(memory: ModuleType, steps: ModuleType) -> None:
    row = rows_of(memory)["dreamfusion"].shrunk()
    stage = steps.build_stage(row, steps.Brightness(), torch.device("cpu"), 0, True)
    share = stage.scene.occupancy.occupied().float().mean()
    assert share == pytest.approx(torch.pi / 6 * memory.BALL**3, rel=0.1)
