"""The tables of `beyond_3d.py`."""

from __future__ import annotations

import itertools
import statistics

from result_store import Figures
from tables import markdown

HEADS = ["rule", "window", "schedule", "steps", "sweeps", "steps a sweep", "evaluations a step"]
HEADS += ["held-out loss", "gap", "speed at equal loss", "drift error", "drift noise"]
NAMES = {
    "characters": "A transformer of characters from scratch",
    "characters, Muon": "The same with Muon on the blocks' matrices",
    "lora": "LoRA of a Llama, rate 1e-3",
    "lora, low rate": "LoRA of a Llama, rate 2e-4",
    "diffusion": "A diffusion UNet",
}


def said(found: Figures) -> str:
    """One run in short."""
    return (
        f"loss {found['loss']:.4f}, {found['steps_per_sweep']:.2f} steps a sweep, "
        f"{found['evaluations_per_step']:.2f} evaluations a step, {found['cpu_seconds']:.0f} s"
    )


def body(content: Figures) -> tuple[str, str]:
    """Notes and tables of the document."""
    tasks: dict[str, dict[tuple[str, int, int, float], Figures]] = {}
    for name, found in content["runs"].items():
        task, rule, window, seed, stretch = name.split("/")
        key = (rule, int(window.split()[1]), int(seed.split()[1]), float(stretch.split()[1]))
        tasks.setdefault(task, {})[key] = found
    parts = [section(task, tasks[task]) for task in NAMES if task in tasks]
    return NOTES, "\n\n".join(parts)


def section(task: str, runs: dict[tuple[str, int, int, float], Figures]) -> str:
    """One task's heading, its distance of seeds, the table of its runs and that of their curves."""
    first = runs.get(("sequential", 1, 0, 1.0))
    losses = [found["loss"] for (rule, *_), found in runs.items() if rule == "sequential"]
    pairs = [abs(one - other) for one, other in itertools.combinations(losses, 2)]
    apart = statistics.fmean(pairs) if pairs else None
    some = next(iter(runs.values()))
    groups = ", ".join(f"{count:,}" for count in some["parameters"])
    lines = [f"## {NAMES[task]}", f"Parameters by group: {groups}."]
    if apart is not None:
        lines[1] += f" Two of {len(losses)} sequential seeds are {apart:.4f} apart on average."
    # By rule as they came first; then windows, stretches and seeds in order.
    order = list(dict.fromkeys(rule for rule, *_ in runs))
    keys = sorted(runs, key=lambda key: (order.index(key[0]), key[1], key[3], key[2]))
    rows = [row(key, runs, first, apart) for key in keys]
    curves = [
        [*label(key), *(f"{loss:.3f} @ {at}" for _, at, loss in runs[key]["curve"])] for key in keys
    ]
    points = max(len(found["curve"]) for found in runs.values())
    shares = [f"{100 * point / points:.0f} %" for point in range(1, points + 1)]
    lines += [
        markdown(HEADS, rows),
        "Held-out loss @ sweeps, at shares of the schedule:",
        markdown([*HEADS[:3], *shares], curves),
    ]
    return "\n\n".join(lines)


def label(key: tuple[str, int, int, float]) -> list[str]:
    """The first three cells of a run's row."""
    rule, window, seed, stretch = key
    return [f"{rule}, seed {seed}" if seed else rule, str(window), f"x {stretch:g}"]


def row(
    key: tuple[str, int, int, float],
    runs: dict[tuple[str, int, int, float], Figures],
    first: Figures | None,
    apart: float | None,
) -> list[str]:
    """A run's row; the speed at equal loss stands on the row of the unstretched schedule."""
    rule, window, seed, stretch = key
    found = runs[key]
    speed = ""
    if first and apart is not None and rule != "sequential" and stretch == 1:
        same = [other for k, other in runs.items() if k[:3] == (rule, window, seed)]
        equal = [other["sweeps"] for other in same if other["loss"] <= first["loss"] + apart]
        speed = f"{first['steps'] / min(equal):.2f}" if equal else "-"
    return [
        *label(key),
        str(found["steps"]),
        str(found["sweeps"]),
        f"{found['steps_per_sweep']:.2f}",
        f"{found['evaluations_per_step']:.2f}",
        f"{found['loss']:.4f}",
        f"{found['loss'] - first['loss']:+.4f}" if first and found is not first else "",
        speed,
        ", ".join(map(percent, found["drift_error"])),
        ", ".join(map(percent, found["drift_noise"])),
    ]


def percent(value: float) -> str:
    """A share of a drift's length."""
    return f"{100 * value:.0f} %"


NOTES = """
Tasks that no rule was chosen for, made and trained by `benchmarks/beyond_tasks.py`: everyday batches, AdamW with
warm-up over a twentieth of the steps and cosine decay to a tenth of the rate, gradients clipped at norm 1 in the
closure. *Drift error* is `DriftTolerance()`, the default, with secants, *step lengths*
`StepRelativeTolerance(2, 0.2)` without secants, *the paper's rule* `AdaptiveTolerance` with the predictor `hold`.
*Schedule x 1.25* is stretched to 1.25 times the steps. *Held-out loss*: mean over the last five steps; *gap*: to
the sequential run with seed 0 on the unstretched schedule. *Speed at equal loss*: that run's steps by the sweeps of
the cheapest run of the same rule and window, on any schedule that was run, whose loss is at most that run's plus
the mean distance of two seeds; "-" where none is. It is the ceiling of the speed-up by as many devices as the
window is wide. *Drift error* and *drift noise*, by parameter group: how far the first drift that is not kept is
off, and how far drifts of neighboring steps lie apart, as shares of the drift's length, over the last sweeps.
"""
