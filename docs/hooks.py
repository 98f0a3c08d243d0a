"""What the site adds to mkdocs: pages from outside docs/, and two checks that make a build fail.

The repository's Markdown is written to be read where it lies, with links from file to file. The site shows the same
files: README.md is its home, and whatever a page links to outside docs/ (a table of results, an example, another
README) becomes a page of its own.
"""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
HOME = "index.md"
LINK = re.compile(
    r"(?P<before>\]\()(?P<path>(?!https?:|mailto:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))"
)
"""A Markdown link or picture to a file, without titles."""
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
ADDRESS = re.compile(r"url\(\s*[\"']?(?:https?:)?//|@import\s+[\"']?(?:https?:)?//")
"""Where a style sheet asks another machine for something."""


def source_of(page: str) -> Path:
    """Returns the file in the repository that a page of the site shows."""
    if page == HOME:
        return ROOT / "README.md"
    inside = ROOT / "docs" / page
    return inside if inside.exists() else ROOT / page


def page_of(source: Path) -> str | None:
    """Returns the address of a file on the site, or None if it is a folder or outside the repository."""
    if source == ROOT / "README.md":
        return HOME
    if not source.is_file() or not source.is_relative_to(ROOT):
        return None
    if source.is_relative_to(ROOT / "docs"):
        return str(source.relative_to(ROOT / "docs"))
    path = str(source.relative_to(ROOT))
    is_page = source.suffix in {".md", ".png", ".gif", ".svg", ".webp"}
    return path if is_page else f"{path}.md"


def links(text: str) -> list[re.Match[str]]:
    """Returns the links of a page that are not in a block of code."""
    fences = [match.span() for match in FENCE.finditer(text)]
    return [m for m in LINK.finditer(text) if not any(a <= m.start() < b for a, b in fences)]


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the home page, and every file outside docs/ that a page links to or the navigation names."""
    waiting = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    waiting += [ROOT / name for name in named_in(config["nav"]) if (ROOT / name).exists()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        page = page_of(source)
        assert page is not None
        if files.get_file_from_path(page) is None:
            files.append(added(page, source, config))
        if source.suffix != ".md":
            continue
        for link in links(source.read_text()):
            target = Path(os.path.normpath(source.parent / link["path"]))
            if target not in seen and page_of(target) is not None:
                seen.add(target)
                waiting.append(target)
    return files


def named_in(nav: Any) -> list[str]:
    """Returns the files that the navigation names, at any depth."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [name for value in values for name in named_in(value)]


def added(page: str, source: Path, config: Any) -> File:
    """Returns a file of the site from outside docs/; code becomes a page that shows it."""
    if page in {HOME, str(source.relative_to(ROOT))}:
        file = File.generated(config, page, abs_src_path=str(source))
    else:
        language = {".py": "python", ".json": "json"}.get(source.suffix, "text")
        name = source.relative_to(ROOT)
        text = f"# {name}\n\n```{language}\n{source.read_text()}\n```\n"
        file = File.generated(config, page, content=text)
    if page.endswith(".md") and page not in named_in(config["nav"]):
        file.inclusion = type(file.inclusion).NOT_IN_NAV
    return file


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Points links at the site's pages where they lead out of docs/."""
    here = source_of(page.file.src_uri)
    folder = Path(page.file.src_uri).parent
    for link in reversed(links(markdown)):
        target = page_of(Path(os.path.normpath(here.parent / link["path"])))
        if target is not None:
            path = os.path.relpath(target, folder)
            markdown = markdown[: link.start("path")] + path + markdown[link.end("path") :]
    return markdown


class Seen(HTMLParser):
    """Notes of a page what would be fetched from other machines, and pictures without a description."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Looks at one element."""
        given = {name: value or "" for name, value in attrs}
        if tag == "img" and not given.get("alt", "").strip():
            self.faults.append(f"a picture without a description: {given.get('src')}")
        loaded = [given.get(name, "") for name in ("src", "srcset", "poster", "data")]
        if tag == "link" and given.get("rel") not in {"canonical", "next", "prev"}:
            loaded.append(given.get("href", ""))
        if tag != "a" and any(re.match(r"(https?:)?//", value) for value in loaded):
            self.faults.append(f"<{tag}> asks another machine: {loaded}")


def on_post_build(*, config: Any) -> None:
    """Fails if a page has a picture without a description or would ask another machine for anything.

    Raises:
        PluginError: With everything that was found.
    """
    site, faults = Path(config["site_dir"]), []
    for path in sorted(site.rglob("*.html")):
        seen = Seen()
        seen.feed(path.read_text())
        faults += [f"{path.relative_to(site)}: {fault}" for fault in seen.faults]
    for path in sorted(site.rglob("*.css")):
        if ADDRESS.search(path.read_text()):
            faults.append(f"{path.relative_to(site)}: asks another machine for something")
    if faults:
        raise PluginError("\n".join(faults))
