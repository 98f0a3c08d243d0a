"""The command `picardopt compare`, which shows runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from picardopt_3d.cli_errors import cli_errors, options_of


@dataclass(frozen=True)
class CompareConfig:
    """The options of `picardopt compare`.

    Attributes:
        runs: Folders of finished runs, of any methods; figures are compared with those of the first one.
        out: The page to write: one HTML file that needs nothing beside it.
    """

    runs: Positional[tuple[Path, ...]]
    out: Path = Path("compare.html")

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: There is nothing to compare, or the page's name is none of a page.
        """
        if len(dict.fromkeys(self.runs)) < 2:
            raise ValueError("fewer than two runs: give the folders of two finished runs or more")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"out={str(self.out)!r}: give a file that ends in .html")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt compare`; None: those of this process.

    Raises:
        SystemExit: 2 if the arguments or the runs cannot be used, 130 after Ctrl-C.
    """
    with cli_errors("compare"):
        described = "Show finished runs side by side, on one page for a browser."
        print(_compare(options_of(CompareConfig, "compare", argv, described)))


def _compare(config: CompareConfig) -> str:
    """Writes the page, and returns what to print about it: the main figures of each run."""
    # Imported here because torch takes seconds to import, which a mistyped option should not wait for.
    from picardopt_3d.io import replacing
    from picardopt_3d.pages.compare import comparison, figures, short_names
    from picardopt_3d.run.finished import read_run

    if config.out.is_dir():
        raise IsADirectoryError(f"out={str(config.out)!r} is a folder: give the file to write")
    runs = [read_run(folder) for folder in dict.fromkeys(config.runs)]
    html = comparison(runs)
    with replacing(config.out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    names = short_names([run.folder for run in runs])
    told = {"PSNR", "Steps a sweep", "Optimization"}
    rows = [row for row in figures([run.report for run in runs]) if row.label in told]
    lines = [
        f"  {name}: " + ", ".join(f"{row.label} {row.cells[index].text}" for row in rows)
        for index, name in enumerate(names)
    ]
    return "\n".join([f"{config.out}: {len(runs)} runs side by side", *lines])
