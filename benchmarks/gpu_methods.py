"""Every method's pipeline, with the models that ship, on an accelerator: does it run, and what does a step take?

    python benchmarks/gpu_methods.py --out benchmarks/results/gpu_methods.md

Each run is the command itself, at its small preset with fewer steps, one process and a window of 8. PSNR is that of
held-out views against the true ones; with so few steps it is no measure of quality, only of sanity.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from picardopt_3d.world.pictures import write_examples
from tables import document, machine, markdown, number, publish

TEXT = "a blue chair"
STAGES: dict[str, tuple[str, ...]] = {
    "dreamfusion": ("recipe",),
    "textmesh": ("recipe",),
    "magic3d": ("recipe.coarse", "recipe.refine"),
    "prolificdreamer": ("recipe.nerf", "recipe.geometry", "recipe.texture"),
    "dreamgaussian": ("recipe.gaussians", "recipe.texture"),
    "zero123": ("recipe",),
    "zero123-gaussians": ("recipe",),
}
"""The options of each method's stages."""
OF_PICTURES = {"zero123", "zero123-gaussians"}


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        methods: Names of methods.
        steps: Of each stage; None: the preset's.
        device: Where.
        seconds: Longest run.
        out: Markdown file.
    """

    methods: tuple[str, ...] = tuple(STAGES)
    steps: int | None = 40
    device: str = "cuda"
    seconds: float = 60.0
    out: Path | None = None


def command(options: Options, method: str, picture: Path, folder: Path) -> list[str]:
    """Returns a run's command line, after `picardopt`."""
    of_picture = ["image-to-3d", str(picture), "--framed", "--elevation", "20", "--azimuth", "30"]
    line = of_picture if method in OF_PICTURES else ["text-to-3d", TEXT]
    line += ["--method", method, "--out", str(folder), "--device", options.device]
    line += ["--workers", "1", "--window", "8"]
    if options.steps is not None:
        for stage in STAGES[method]:
            line += [f"--{stage}.steps", str(options.steps)]
    return line


def run(options: Options, method: str, picture: Path) -> list[list[str]]:
    """Runs a method; returns a row for each stage, or one that says why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        entry = "import sys; from picardopt.cli import main; sys.exit(main())"
        rest = command(options, method, picture, Path(folder, "run"))
        line, start = [sys.executable, "-c", entry, *rest], time.perf_counter()
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=options.seconds)
        except subprocess.TimeoutExpired:
            return [[method, "", f"cut off after {options.seconds:g} s", "", "", "", ""]]
        seconds = time.perf_counter() - start
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            said = last[0][-300:] if last else f"exit status {done.returncode}"
            return [[method, "", f"FAILED: {said}", "", "", "", number(seconds)]]
        report: dict[str, Any] = json.loads(Path(folder, "run", "report.json").read_text())
    stages = report.get("stages", [report])
    rows = [[method, stage.get("name", ""), "ran", *figures(stage), ""] for stage in stages]
    rows[-1][-1] = number(seconds)
    return rows


def figures(stage: dict[str, Any]) -> list[str]:
    """Returns the milliseconds of a step, the steps of a sweep and the PSNR of a stage."""
    step = 1e3 * stage["seconds"] / max(1, stage["steps_done"])
    psnr = f"{stage['psnr']:.1f}" if "psnr" in stage else ""  # a picture alone has no true views
    return [number(step), f"{stage['mean_stride']:.1f}", psnr]


NOTES = """
`--preset small` with the models that ship, {steps} steps a stage, one process, a window of 8. *A step*: milliseconds of
a committed step. *PSNR*: of 32 held-out views of runs from a text, dB; after so few steps it shows sanity, not quality.
*In all*: seconds of the command, with start-up, the film and the report.
"""


def main(options: Options) -> int:
    """Prints the table, and writes it; returns 1 if a method did not run to its end."""
    where, rows = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        pictures = {path.stem: path for path in write_examples(Path(folder))}
        for method in options.methods:
            rows += run(options, method, pictures["red_chair"])
            print(*rows[-1], file=sys.stderr, flush=True)
    headers = ("method", "stage", "result", "a step, ms", "steps a sweep", "PSNR", "in all, s")
    notes = NOTES.format(steps=options.steps or "the preset's")
    command_line = " ".join(["python benchmarks/gpu_methods.py", *sys.argv[1:]])
    text = document(
        "The methods on an accelerator", command_line, where, notes, markdown(headers, rows)
    )
    publish(text, options.out)
    return int(any(row[2] != "ran" for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
