"""Measures what a run that names no workers and no window chooses them from: seconds and strides of small presets.

    python benchmarks/recipe_curves.py                 # all that are missing in the package's curves.json
    python benchmarks/recipe_curves.py --only dreamfusion/small

Each preset of a single stage, from a text, with one batch size and its window from the number of workers, takes its
first steps on one core, with a window of 8. Times are the processor's, those of gradients the least of several: others
may share the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from curves import processor_time
from picardopt_3d.command import parse
from picardopt_3d.io import write_json
from picardopt_3d.methods import METHODS
from picardopt_3d.plan import first_steps
from picardopt_3d.run.choice import CURVES, measured_of
from tables import machine

from picardopt.probe import measure

STEPS, WINDOWS = 64, range(1, 17)
COMMAND, TEXT = "text-to-3d", "a blue chair"


def presets() -> list[tuple[str, str]]:
    """Method and name of the presets that a curve can serve."""
    found = []
    for method, entry in METHODS[COMMAND].items():
        for name, recipe in entry.presets.items():
            stage, *later = (each.config for each in recipe.stages())
            steady = not later and isinstance(stage.batch, int) and stage.picard.window is None
            if name.startswith("small") and steady:
                found.append((method, name))
    return found


def curve(method: str, preset: str, steps: int) -> dict[str, Any]:
    """Measures one preset on one core."""
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--method", method, "--preset", preset, "--device", "cpu", "--out", folder]
        config = parse(COMMAND, [TEXT, *options], "")
        _, optimizer, closure = first_steps(config, steps)
    (stage,) = config.recipe.stages()
    found = measure(optimizer, {stage.config.batch: closure}, WINDOWS)
    drifts = {batch: (min(seconds),) for batch, seconds in found.drifts.items()}
    joined = {slots: (min(seconds),) for slots, seconds in found.joined.items()}
    measured = asdict(replace(found, drifts=drifts, joined=joined))
    names = {"command": COMMAND, "method": method, "preset": preset, "device": "cpu"}
    return names | {"machine": where, "steps": optimizer.step_index, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ["/".join(each) for each in presets()]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--out", type=Path, default=CURVES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    content = json.loads(given.out.read_text())["curves"] if given.out.exists() else []
    known = {(each["method"], each["preset"]): each for each in content}
    for key in presets():
        if "/".join(key) in given.only and (given.again or key not in known):
            with processor_time():
                known[key] = curve(*key, given.steps)
            found = measured_of(known[key]["measured"])
            print(*key, found.drifts, found.joined, found.strides, flush=True)
            curves = {
                "made by": "benchmarks/recipe_curves.py",
                "curves": [known[k] for k in sorted(known)],
            }
            write_json(given.out, curves)


if __name__ == "__main__":
    main()
