"""Long benchmarks: every finished run is saved in a JSON, so that a stopped benchmark continues where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from picardopt_3d.io import write_json
from tables import document, machine

Figures = dict[str, Any]


class ResultStore:
    """The runs of a benchmark in a JSON, and the document made from them.

    Args:
        out: The JSON; the document lies beside it, with the suffix .md.
        command: The command that makes it.
        setup: What all runs have in common; a file with another one is refused.
        title: Of the document.
        body: The document's notes and tables, from the content of the JSON.

    Raises:
        ValueError: The file holds runs of another setup.
    """

    def __init__(
        self,
        out: Path,
        command: str,
        setup: Figures,
        title: str,
        body: Callable[[Figures], tuple[str, str]],
    ) -> None:
        self.out, self.title, self.body = out, title, body
        fresh = {"command": command, "machine": machine(), "setup": setup, "runs": {}}
        self.content: Figures = json.loads(out.read_text()) if out.exists() else fresh
        if self.content["setup"] != setup:
            raise ValueError(
                f"{out} holds runs of {self.content['setup']}: give another --out, or delete it"
            )

    @property
    def runs(self) -> dict[str, Figures]:
        """The figures of each run, by its name."""
        found: dict[str, Figures] = self.content["runs"]
        return found

    def write(self) -> None:
        """Writes the JSON and the document."""
        write_json(self.out, self.content)
        notes, text = self.body(self.content)
        command, where = self.content["command"], self.content["machine"]
        self.out.with_suffix(".md").write_text(document(self.title, command, where, notes, text))

    def carry_out(
        self,
        function: Callable[[Any], tuple[str, Figures]],
        tasks: Sequence[tuple[str, Any]],
        processes: int,
        said: Callable[[Figures], str],
    ) -> None:
        """Carries out the runs that are missing, several at a time with one thread each, and writes the document.

        Args:
            function: Of one task's argument; returns its name and what was found.
            tasks: Names and arguments.
            processes: Runs at a time.
            said: What is printed of a run.
        """
        os.environ["OMP_NUM_THREADS"] = "1"
        todo = [argument for name, argument in tasks if name not in self.runs]
        self.write()
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for done, (name, found) in enumerate(pool.imap_unordered(function, todo), 1):
                self.runs[name] = found
                self.write()
                print(f"{done}/{len(todo)} {name}: {said(found)}", flush=True)
