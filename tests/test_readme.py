"""The code of README.md, docs/guide.md, docs/closures.md, docs/tolerances.md and docs/plan.md runs as it stands."""

import functools
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import picardopt
from tests.helpers.versions import needs_3d

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md", "docs/closures.md", "docs/tolerances.md", "docs/plan.md")
LAUNCHED = re.compile(r"# torchrun --nproc-per-node (\d+) train\.py.*\n")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, capsys):
    """One after the other, as in a notebook: a block may use what one before it made."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    ran = [block for block in blocks(page) if not LAUNCHED.match(block)]
    assert ran
    for block in ran:
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        optimizer = names["optimizer"]
        assert optimizer.stats.steps == 200
        assert optimizer.stats.sweeps < 100
        assert float(names["loss"]) < 0.5  # about 1.6 at the start
        assert "steps per sweep" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_blocks_for_several_processes_run_under_torchrun(page, tmp_path):
    for block in blocks(page):
        launched = LAUNCHED.match(block)
        if launched is None:
            continue
        (tmp_path / "train.py").write_text(block)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", launched[1]]
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / "train.py")],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr


def test_the_guide_has_such_a_block():
    assert any(LAUNCHED.match(block) for block in blocks("docs/guide.md"))


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_the_files_that_it_names_are_there(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text)
    named = re.findall(
        r"`((?:picardopt|integrations|benchmarks|examples|tests|docs)/[\w./]*)`", text
    )
    assert page != "README.md" or links + named
    for path in links:
        assert ((ROOT / page).parent / path).exists(), path
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_examples_that_it_names_are_there():
    names = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(names)


def resolve(name: str) -> object:
    """What a dotted name of paper-to-code.md means: an attribute of a module, or of a class of either package."""
    for package in ("picardopt", "picardopt_3d"):
        for split in range(name.count(".") + 1, 0, -1):
            parts = name.split(".")
            try:
                found = importlib.import_module(".".join([package, *parts[:split]]))
            except ImportError:
                continue
            return functools.reduce(getattr, parts[split:], found)
    import picardopt_3d

    classes: dict[str, object] = {}
    for package in (picardopt_3d, picardopt):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            classes |= vars(importlib.import_module(module.name))
    first, *rest = name.split(".")
    return functools.reduce(getattr, rest, classes[first])


@needs_3d
def test_the_names_in_paper_to_code_exist():
    text = (ROOT / "docs" / "paper-to-code.md").read_text()
    cells = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    named = re.findall(r"`((?:\w+\.)*\w+\.\w+|[A-Z]\w+)(?:\(.*?\))?`", "\n".join([*cells, *prose]))
    names = [name for name in named if not name.endswith((".py", ".csv", ".md"))]
    assert len(names) > 20
    missing = []
    for name in names:
        try:
            resolve(name)
        except (AttributeError, KeyError):
            missing.append(name)
    assert missing == []
