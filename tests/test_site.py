"""The documentation's site: it builds without a warning, and what is wrong with a page fails the build."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.pages import ROOT

pytest.importorskip("mkdocs", reason="make docs needs mkdocs-material")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "page"),
    [
        ("README.md", "index.md"),
        ("docs/guide.md", "guide.md"),
        ("docs/images/winner_map.png", "images/winner_map.png"),
        ("benchmarks/results/rounds.md", "benchmarks/results/rounds.md"),
        ("examples/image_fitting.py", "examples/image_fitting.py.md"),
        ("examples", None),
        ("../elsewhere.md", None),
    ],
)
def test_a_file_has_one_page(hooks: ModuleType, source: str, page: str | None) -> None:
    assert hooks.page_of(Path(os.path.normpath(ROOT / source))) == page
    if page is not None and not page.endswith(".py.md"):
        assert hooks.source_of(page) == ROOT / source


def test_links_in_code_are_left_alone(hooks: ModuleType) -> None:
    text = "[a](b.md#c) and ![d](e.png)\n```md\n[f](g.md)\n```\n[h](https://i.org) [j](#k)\n"
    assert [link["path"] for link in hooks.links(text)] == ["b.md", "e.png"]


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<img src="a.png">', "without a description"),
        ('<img src="a.png" alt=" ">', "without a description"),
        ('<script src="https://cdn.org/a.js"></script>', "another machine"),
        ('<link rel="stylesheet" href="//fonts.org/a.css">', "another machine"),
        ('<a href="https://arxiv.org">a link</a><img src="a.png" alt="a">', None),
        ('<link rel="canonical" href="https://docs.org">', None),
    ],
)
def test_what_a_page_may_not_have_is_found(hooks: ModuleType, html: str, fault: str | None) -> None:
    seen = hooks.Seen()
    seen.feed(html)
    assert len(seen.faults) == (fault is not None)
    assert fault is None or fault in seen.faults[0]


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    return subprocess.run(
        [*command, str(site)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "text", "fault"),
    [
        ("docs/faq.md", "", None),
        ("docs/faq.md", "[gone](gone.md)", "gone.md"),
        ("docs/faq.md", "[gone](guide.md#gone)", "#gone"),
        ("docs/faq.md", "[gone](../benchmarks/gone.md)", "gone.md"),
        ("docs/faq.md", "![](images/methods.png)", "without a description"),
        ("docs/new.md", "# Not in the navigation", "new.md"),
        ("docs/reference.md", "::: picardopt.gone", "picardopt.gone"),
    ],
)
def test_a_fault_in_the_documents_fails_the_build(
    page: str, text: str, fault: str | None, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith(("tests/", "integrations/picardopt_3d/weights/")):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, project / name)
    with (project / page).open("a") as file:
        file.write(f"\n\n{text}\n")
    done = build(project, tmp_path / "site")
    assert (done.returncode == 0) == (fault is None), done.stdout + done.stderr
    assert fault is None or fault in done.stdout + done.stderr
