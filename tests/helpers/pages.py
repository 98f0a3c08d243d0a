"""The documents, and what stands in their blocks of code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "integrations").glob("*.md")),
    *sorted((ROOT / "integrations").glob("adapters/**/*.md")),
]
BLOCK = re.compile(
    r"(?:<!-- (?P<note>fragment|slow): .+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
LAUNCHED = re.compile(r"# torchrun --nproc-per-node (\d+) train\.py.*\n")


@dataclass(frozen=True)
class Block:
    """A block of code of a document.

    Attributes:
        page: Its file, from the root.
        language: As the fence says.
        code: Its lines.
        note: "fragment" if it does not run alone, "slow" if it runs in the slow tests only.
    """

    page: str
    language: str
    code: str
    note: str | None = None

    @property
    def processes(self) -> int | None:
        """In how many processes the block's first line asks to be run, if it does."""
        launched = LAUNCHED.match(self.code)
        return int(launched[1]) if launched else None


def name_of(page: Path) -> str:
    """The page's file, from the root."""
    return str(page.relative_to(ROOT))


def blocks(page: str, language: str = "python") -> list[Block]:
    """The blocks of a page in one language, from the top."""
    found = BLOCK.finditer((ROOT / page).read_text())
    return [
        Block(page, each["language"], each["code"], each["note"])
        for each in found
        if each["language"] == language
    ]
