"""Writes `results.json` anew: `python -m tests.golden.record`, from the repository's root; a few minutes.

Names, or parts of them, make it record those runs alone and keep the others.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden import core, recipes
from tests.golden.results import PATH, fingerprint, is_here, load
from tests.helpers.pool import Pools


def record(parts: list[str]) -> dict[str, Any]:
    """Makes the runs whose names hold one of `parts` (all, if there is none)."""
    pools, made = Pools(), {"core": dict[str, Any](), "recipes": dict[str, Any]()}
    for name, run in core.RUNS.items():
        if chosen(name, parts):
            ranks = pools(run.processes).run(core.run, name)
            assert all(other == ranks[0] for other in ranks), f"{name}: ranks differ"
            made["core"][name] = ranks[0]
    pools.close()
    for name in recipes.RUNS:
        if chosen(name, parts):
            with tempfile.TemporaryDirectory() as folder:
                made["recipes"][name] = recipes.run(name, Path(folder))
    return made


def chosen(name: str, parts: list[str]) -> bool:
    return not parts or any(part in name for part in parts)


def main(parts: list[str]) -> None:
    torch.set_num_threads(1)
    made = record(parts)
    before: dict[str, Any] = {"core": {}, "recipes": {}}
    if parts:
        before = load()
        if not is_here(before):
            raise SystemExit("recorded on another machine or torch: record all runs")
    content: dict[str, Any] = {"fingerprint": fingerprint()}
    for kind, names in (("core", core.RUNS), ("recipes", recipes.RUNS)):
        kept = before[kind] | made[kind]
        content[kind] = {name: kept[name] for name in names}
    PATH.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main(sys.argv[1:])
