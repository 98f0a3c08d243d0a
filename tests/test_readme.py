"""README.md: its diff is the same training, it is short, and what it and the other documents name is there."""

import functools
import importlib
import pkgutil
import re

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import picardopt
from tests.helpers.pages import DOCUMENTS, ROOT, blocks, name_of
from tests.helpers.versions import needs_3d

STEPS_OF_DIFF = 30


def sides_of_diff(diff: str) -> tuple[str, str]:
    """What a diff takes away with its context, and what it puts there."""
    lines = diff.splitlines()
    old, new = ([line[1:] for line in lines if line[:1] in (" ", sign, "")] for sign in "-+")
    return "\n".join(old), "\n".join(new)


def run_side(code: str, **options: object) -> torch.nn.Module:
    """Runs one side of the README's diff on a small task; returns what was trained."""
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    data = TensorDataset(x, x.sin().sum(dim=1, keepdim=True))
    shuffled = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    wrapper = functools.partial(picardopt.ParallelPicardOptimizer, **options)
    imported = "from picardopt import ParallelPicardOptimizer, StepIndexedLoader\n"
    names = {
        "torch": torch,
        "model": model,
        "loader": DataLoader(data, batch_size=8, shuffle=True, generator=shuffled),
        "epochs": STEPS_OF_DIFF // 5,
        "loss_of": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        "ParallelPicardOptimizer": wrapper,
        "StepIndexedLoader": picardopt.StepIndexedLoader,
    }
    exec(compile(code.replace(imported, ""), "README.md", "exec"), names)
    return model


def test_the_diff_is_the_same_training():
    """Both sides run as they stand; at tolerance 0 they end at the same bits."""
    (diff,) = blocks("README.md", "diff")
    old, new = sides_of_diff(diff.code)
    assert "ParallelPicardOptimizer" in new
    assert "picardopt" not in old
    before, exact, close = run_side(old), run_side(new, tolerance=0), run_side(new)
    for a, b in zip(before.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before.parameters(), close.parameters(), strict=True):
        assert torch.allclose(a, b, atol=0.01)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            before.parameters(), run_side(old.replace("1e-3", "2e-3")).parameters(), strict=True
        )
    )


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_its_moving_picture_is_small():
    path, *_ = re.findall(
        r"^!\[.+\]\((\S+)\)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    assert (ROOT / path).stat().st_size < 1_000_000
    with Image.open(ROOT / path) as picture:
        assert picture.n_frames > 20


def test_the_targets_of_make_exist():
    """Every `make` that a document shows is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in DOCUMENTS:
        shown = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
        assert set(shown) <= targets, page


@pytest.mark.parametrize("page", [*map(name_of, DOCUMENTS)])
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
        # Pages on other people's repositories name files of those.
        assert (ROOT / path).exists() or page.startswith("integrations/adapters/"), path


def test_the_guide_names_every_example():
    guide = (ROOT / "docs" / "guide.md").read_text()
    names = re.findall(r"^\| `(\w+\.py)` \|", guide, flags=re.MULTILINE)
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
