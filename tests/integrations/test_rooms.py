"""Which part of the 3D package may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import picardopt_3d
import pytest

PACKAGE = Path(picardopt_3d.__file__).parent
WORLD = "picardopt_3d.world"
MAY_KNOW_THE_WORLD = {
    "task.py",  # the one door for what users ask for
    "guidance/exact_score.py",  # is made of its views
}
"""Files outside of `world` and `training` that import the built-in world at the top."""


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + str(node.module or "")


def files() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "name", [name for name in files() if not name.startswith(("world/", "training/"))]
)
def test_only_tasks_and_the_yardstick_know_the_built_in_world(name: str) -> None:
    knows = any(module.startswith(WORLD) for module in imported(PACKAGE / name))
    assert knows == (name in MAY_KNOW_THE_WORLD)


def test_the_training_loop_knows_nothing_of_3d() -> None:
    own = {name for name in imported(PACKAGE / "run/loop.py") if name.startswith("picardopt_3d")}
    assert own == {"picardopt_3d.problem", "picardopt_3d.run.record"}


@pytest.mark.parametrize("name", files())
def test_imports_are_absolute(name: str) -> None:
    assert not [module for module in imported(PACKAGE / name) if module.startswith(".")]
