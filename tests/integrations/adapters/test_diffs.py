"""The diffs of the adapters apply, and ask picardopt for what it has."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import picardopt

ADAPTERS = Path(__file__).parents[3] / "integrations" / "adapters"
DIFFS = sorted(ADAPTERS.rglob("*.diff"))
CHECKOUTS = os.environ.get("PICARDOPT_CHECKOUTS")
"""A folder of the repositories that the READMEs name, at their commits, by name."""

every_diff = pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)


def originals(diff: Path) -> dict[str, str]:
    """The files that a diff changes, as far as it shows them; a line that it does not show holds its number."""
    found: dict[str, list[str]] = {}
    for line in diff.read_text().splitlines():
        if line.startswith("--- a/"):
            lines = found.setdefault(line.removeprefix("--- a/"), [])
        elif match := re.match(r"@@ -(\d+)", line):
            lines += [f"line {n}" for n in range(len(lines) + 1, int(match[1]))]
        elif found and line.startswith((" ", "-")):
            lines.append(line[1:])
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


def apply(diff: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "apply", *options, str(diff)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@every_diff
def test_it_applies_to_the_lines_that_it_shows(diff: Path, tmp_path: Path) -> None:
    for name, text in originals(diff).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = apply(diff, tmp_path)
    assert done.returncode == 0, done.stderr
    added = [line[1:] for line in diff.read_text().splitlines() if re.match(r"\+(?!\+\+ )", line)]
    changed = "".join((tmp_path / name).read_text() for name in originals(diff))
    assert added
    assert all(line + "\n" in changed for line in added)


def test_one_that_does_not_fit_is_found(tmp_path: Path) -> None:
    (name, text), *_ = originals(DIFFS[0]).items()
    (tmp_path / name).parent.mkdir(parents=True)
    first_shown = next(
        line for line in text.splitlines() if not re.match(r"line \d+$", line) and line
    )
    (tmp_path / name).write_text(text.replace(first_shown, "another line", 1))
    assert apply(DIFFS[0], tmp_path).returncode != 0


@every_diff
def test_it_imports_what_picardopt_has(diff: Path) -> None:
    for names in re.findall(r"^\+from picardopt import (.*)$", diff.read_text(), re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(picardopt, name), name


@pytest.mark.parametrize("diff", [path for path in DIFFS if (path.parent / "README.md").exists()])
def test_its_readme_names_it_and_the_commit(diff: Path) -> None:
    readme = (diff.parent / "README.md").read_text()
    assert diff.name in readme
    assert re.search(r"\b[0-9a-f]{40}\b", readme)


@pytest.mark.skipif(CHECKOUTS is None, reason="PICARDOPT_CHECKOUTS names no folder of checkouts")
@every_diff
def test_it_applies_to_the_real_file(diff: Path) -> None:
    for name in originals(diff):
        holders = [path for path in Path(str(CHECKOUTS)).iterdir() if (path / name).exists()]
        if not holders:
            pytest.skip(f"no checkout holds {name}")
    assert any(apply(diff, path, "--check").returncode == 0 for path in holders)
