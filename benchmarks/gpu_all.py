"""All that needs a GPU, in one command of at most nine minutes: checks, curves, overhead, every method.

    python benchmarks/gpu_all.py

Each part is a script of its own with a time limit; a part that fails or is cut off does not keep the others from
running. Results go to `--out`, a file for each part with the device's name in it, and `summary.md`.
`--device cpu --small` tries the parts at tiny sizes where there is no GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tables import document, machine, markdown, publish

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """A script, and how long it may take.

    Attributes:
        arguments: Of Python; `{out}` stands for the folder of results, `{device}` for the device.
        small: More of them, for a try at tiny sizes; they follow the others and so replace them.
        seconds: Longest run.
    """

    arguments: tuple[str, ...]
    small: tuple[str, ...]
    seconds: float


def script(name: str, *arguments: str, out: str, seconds: float, small: tuple[str, ...]) -> Part:
    """Returns the part that a script of this folder does."""
    line = (str(HERE / name), *arguments, "--device", "{device}", "--out", "{out}/" + out)
    return Part(line, small, seconds)


PARTS: dict[str, Part] = {
    "checks": script(
        *("gpu_smoke.py", "--skip-command", "--parameters", "1000000", "10000000"),
        out="checks.md",
        seconds=70,
        small=("--parameters", "1000"),
    ),
    "drift": script(
        "gpu_drift.py",
        out="drift.md",
        seconds=90,
        small=("--small", "--parameters", "1000", "--batches", "1", "--compiled", "--sweeps", "3"),
    ),
    "curve": script(
        "gpu_curve.py",
        out="curve.json",
        seconds=150,
        small=("--small", "--parameters", "1000", "--batches", "1", "2", "--compiled"),
    ),
    "methods": script(
        "gpu_methods.py",
        out="methods.md",
        seconds=150,
        small=("--methods", "dreamfusion", "--steps", "4"),
    ),
    "tests": Part(
        ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")),
        ("--collect-only", "-qq"),
        90,
    ),
}
"""In order of what is missed most if time runs out."""


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        out: Folder of results.
        parts: Names of parts.
        seconds: For all parts together.
        device: Where.
        small: Tiny sizes, to check the scripts themselves.
    """

    out: Path = field(default_factory=lambda: ROOT / "build" / "gpu")
    parts: tuple[str, ...] = tuple(PARTS)
    seconds: float = 530.0
    device: str = "cuda"
    small: bool = False


def run(options: Options, name: str, seconds: float) -> list[str]:
    """Runs a part for at most so many seconds; returns its row. What it prints goes to a log."""
    part, log = PARTS[name], options.out / f"{name}.log"
    arguments = part.arguments + (part.small if options.small else ())
    filled = [
        a.replace("{out}", str(options.out)).replace("{device}", options.device) for a in arguments
    ]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *filled],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            result = f"FAILED ({status})" if status else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            result = f"cut off after {seconds:.0f} s"
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    return [name, result, f"{time.perf_counter() - start:.0f}", tail[0][:160] if tail else ""]


NOTES = """
Parts of `benchmarks/gpu_all.py`; each wrote a file of its own beside this one, with the command and the machine. The
last column is the last line that a part printed.
"""


def main(options: Options) -> int:
    """Runs the parts and writes the summary; returns 1 if one did not pass."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_all: torch {torch.__version__} finds no CUDA device here; nothing was run",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    where, deadline, rows = machine(), time.perf_counter() + options.seconds, []
    for name in options.parts:
        left = deadline - time.perf_counter()
        if left > 5:
            rows.append(run(options, name, min(left, PARTS[name].seconds)))
        else:
            rows.append([name, "no time left", "0", ""])
        print(*rows[-1], flush=True)
        command = " ".join(["python benchmarks/gpu_all.py", *sys.argv[1:]])
        table = markdown(("part", "result", "seconds", "last line"), rows)
        summary = document("On a GPU", command, where, NOTES, table)
        (options.out / "summary.md").write_text(summary)
    publish(summary, None)
    return int(any(row[1] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
