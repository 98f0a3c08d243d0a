"""Every block of Python in the documents is run by some test, or says that it is a fragment and imports what exists."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.pages import DOCUMENTS, LAUNCHED, ROOT, Block, blocks, name_of
from tests.helpers.versions import needs_3d, tomllib

ELSEWHERE = {"docs/frameworks.md": "tests/frameworks/test_page.py"}
"""Pages whose blocks need what the page takes for granted, and the tests that run them so."""
PYTHON = {name_of(page): blocks(name_of(page)) for page in DOCUMENTS}
RUN = {
    page: [each for each in found if each.note != "fragment" and each.processes is None]
    for page, found in PYTHON.items()
    if page not in ELSEWHERE
}
TOGETHER = [each for found in PYTHON.values() for each in found if each.processes]
COMMANDS = ("text-to-3d", "image-to-3d")


def marks(found: list[Block]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if any(each.note == "slow" for each in found) else []


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=marks(found)) for page, found in RUN.items() if found]
)
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as in a notebook: a block may use what one before it made."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in RUN[page]:
        exec(compile(block.code, page, "exec"), names)


@pytest.mark.parametrize(
    "block", [pytest.param(each, marks=marks([each]), id=each.page) for each in TOGETHER]
)
def test_a_block_for_several_processes_runs_under_torchrun(block: Block, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(block.code)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [sys.executable, *command, str(block.processes), str(tmp_path / "train.py")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_the_pages_that_should_have_blocks_have_some() -> None:
    for page in ("docs/tutorial.md", "docs/guide.md", "docs/how-it-works.md", "docs/closures.md"):
        assert RUN[page], page
    assert FRAGMENTS
    assert {each.page for each in TOGETHER} >= {"docs/tutorial.md", "docs/data-parallel.md"}
    for page, test in ELSEWHERE.items():
        assert PYTHON[page]
        assert (ROOT / test).exists()


def test_a_launch_line_stands_first() -> None:
    """A block that names torchrun further down would run in one process, unseen."""
    for found in PYTHON.values():
        for block in found:
            assert bool(LAUNCHED.search(block.code)) == (block.processes is not None), block.page


def _fragment(found: Block) -> object:
    needed = [needs_3d] if "picardopt_3d" in found.code else []
    return pytest.param(found, marks=needed, id=found.page)


FRAGMENTS = [each for found in PYTHON.values() for each in found if each.note == "fragment"]


@pytest.mark.parametrize("block", list(map(_fragment, FRAGMENTS)))
def test_a_fragment_imports_what_exists(block: Block) -> None:
    tree = ast.parse(block.code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), "fragment", "exec"), {})


def shown_commands(*pages: str) -> list[list[str]]:
    """The `picardopt` commands that pages show, all if none is named, as the shell would split them."""
    found = []
    for page in pages or map(name_of, DOCUMENTS):
        for block in blocks(page, "sh"):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and Path(words[0]).name == "picardopt":
                    found.append(words[1:])
    return found


def test_the_commands_shown_exist() -> None:
    project = tomllib.loads((ROOT / "integrations" / "pyproject.toml").read_text())["project"]
    known = set(project["entry-points"]["picardopt.commands"])
    shown = {words[0] for words in shown_commands()}
    assert {"text-to-3d", "image-to-3d", "resume", "evaluate", "export", "plan"} <= shown
    assert shown - {"--version"} <= known


@needs_3d
def test_the_runs_shown_can_be_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of a run that a document shows is one that the command takes."""
    from picardopt_3d.command import parse
    from picardopt_3d.world.pictures import write_examples

    monkeypatch.chdir(tmp_path)
    picture, *_ = write_examples(Path("pictures"), 64)
    for name in ("chair.png", "photo.jpg"):
        Path(name).write_bytes(picture.read_bytes())
    shown = [words for words in shown_commands() if words[0] in COMMANDS and "..." not in words]
    assert len(shown) > 8
    for command, *arguments in shown:
        config = parse(command, arguments, "")
        assert str(config.out) in arguments


@needs_3d
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_tutorial_run(tmp_path: Path) -> None:
    shown = shown_commands("docs/tutorial.md")
    assert shown
    for words in shown:
        command = [sys.executable, "-m", "picardopt.cli", *words]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=1000)
    made = tmp_path / "outputs" / "torus"
    for name in ("turntable.mp4", "contact_sheet.png", "strides.png", "report.json"):
        assert (made / name).stat().st_size > 1000
