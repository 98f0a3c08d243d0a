"""Every block of Python in the documents is run by some test, or says that it is a fragment and imports what exists."""

import ast
import re
from pathlib import Path

import pytest

from tests.frameworks import test_page
from tests.test_readme import PAGES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "integrations" / "README.md",
]
RUN = {*PAGES, str(test_page.PAGE.relative_to(ROOT))}
BLOCK = re.compile(r"(?P<fragment><!-- fragment: .+ -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text()))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_is_run_or_says_that_it_is_a_fragment(page: Path) -> None:
    if str(page.relative_to(ROOT)) in RUN:
        return
    assert [block["code"] for block in blocks(page) if not block["fragment"]] == []


def test_fragments_import_what_exists() -> None:
    fragments = [block["code"] for page in DOCUMENTS for block in blocks(page) if block["fragment"]]
    assert fragments
    for code in fragments:
        tree = ast.parse(code)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), "fragment", "exec"), {})


def test_the_pages_that_are_run_have_blocks() -> None:
    assert {page for page in RUN if not blocks(ROOT / page)} == set()
