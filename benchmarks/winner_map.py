"""Who wins: one device, one device with batched calls, data parallelism, running ahead, or both; and by how much.

    python benchmarks/winner_map.py                  # tables and figure from what was measured
    python benchmarks/winner_map.py --measure        # measures this CPU's curve first: minutes

Batches of 1 to 64 views, 1 to 16 devices. Measured are the seconds of a gradient by its batch (and of several slots
that share their calls, on the CPU), the optimizer's steps, and the strides of a recipe; `picardopt.planner` computes
the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curves import BEYOND, MEASURED, Curve, gpu, gpu_drift, processor_time
from picardopt_3d.io import write_json
from tables import document, machine, markdown, number
from winner_cells import BATCHES, DEVICES, SLOTS, Cell, Map, cell, family

from picardopt.links import ETHERNET, LOOPBACK, NVLINK, PCIE

RESULTS, IMAGES = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs" / "images"
CPU_BATCHES = (1, 2, 4, 8, 16)
FAMILIES = {
    "one device": "#BBBBBB",
    "batched calls": "#E69F00",
    "data parallel": "#56B4E9",
    "Picard": "#009E73",
    "Picard x data": "#CC79A7",
}
"""Ways to use devices, with colours that everybody can tell apart (Okabe and Ito's)."""
MOST_VIEWS = 64
"""Of slots that are evaluated together on the CPU: more take much memory."""
SETTING = "rough"
"""Of rounds.py: whose strides."""
GPU_PARAMETERS = 12_599_920


def strides() -> dict[int, float]:
    """Steps a sweep by window: `rounds.py`'s by the default tolerance, and straight lines between its windows."""
    runs: dict[int, list[float]] = {}
    for name, run in json.loads((RESULTS / "rounds.json").read_text())["runs"].items():
        guidance, setting, window, *rule = name.split("/")
        if (guidance, setting) == ("diffusion", SETTING) and rule[:1] == ["coast, drift error"]:
            runs.setdefault(int(window.split()[1]), []).append(run["steps_per_sweep"])
    known = Curve({1: 1.0} | {w: statistics.fmean(found) for w, found in runs.items()}, "")
    return {window: known.seconds(window) for window in range(1, max(known.points) + 1)}


def gpu_maps() -> list[Map]:
    """Of a GPU, over three links."""
    first, curve = gpu_drift()[0], gpu()
    window = 8
    # Everything was accepted: a rollout is as many steps, and as many comparisons.
    ahead, commit = 1e-3 * first["rollout"] / (2 * window), 1e-3 * first["commits"] / window
    return [
        Map(f"H100s, {link.name}", curve, None, link, commit, ahead, 0.0, 4 * GPU_PARAMETERS)
        for link in (NVLINK, PCIE, ETHERNET)
    ]


def cpu_map(found: Mapping[str, Any]) -> Map:
    """Of this CPU: as many such cores as devices."""
    points = {int(batch): seconds for batch, seconds in found["drifts"].items()}
    joined = {int(b): {int(k): s for k, s in each.items()} for b, each in found["joined"].items()}
    costs = (found["commit"], found["ahead"], found["sweep"], found["row_bytes"])
    return Map("CPU cores, loopback", Curve(points, found["machine"]), joined, LOOPBACK, *costs)


def measure_cpu(seconds: float) -> dict[str, Any]:
    """Measures the shipped pixel model on one core: gradients by batch, and slots that share their calls."""
    import torch
    from picardopt_3d.command import parse
    from picardopt_3d.plan import evaluations, first_steps

    from picardopt.probe import joined_seconds, measure, seconds_of

    where, begun = machine(), time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        batch = ("--recipe.batch", str(CPU_BATCHES[0]))
        config = parse("text-to-3d", ["a red cube", "--out", out, "--device", "cpu", *batch], "")
        problem, optimizer, closure = first_steps(config, 48)
    closures = evaluations(problem, closure, CPU_BATCHES)
    known = measure(optimizer, {1: closures[1]}, [8])
    drifts: dict[int, list[float]] = {size: [] for size in CPU_BATCHES}
    joined: dict[int, dict[int, list[float]]] = {size: {} for size in CPU_BATCHES}
    # In turns, because others may share the machine; the least of each counts.
    while time.time() - begun < seconds or not drifts[CPU_BATCHES[-1]]:
        for size in CPU_BATCHES:
            drifts[size] += seconds_of(optimizer, closures[size], 2)
            few = [slots for slots in SLOTS if slots * size <= MOST_VIEWS]
            together = joined_seconds(optimizer, closures[size], few, 1)
            for slots, found in together.items():
                joined[size].setdefault(slots, []).extend(found)
    return {
        "machine": where,
        "command": "python benchmarks/winner_map.py --measure",
        "drifts": {size: min(found) for size, found in drifts.items()},
        "joined": {b: {k: min(s) for k, s in each.items()} for b, each in joined.items()},
        "commit": known.commit,
        "ahead": known.ahead,
        "sweep": known.sweep,
        "row_bytes": known.row_bytes,
    }


def table(of: Map, known: Mapping[int, float]) -> str:
    """One map as a table."""
    marks = {MEASURED: "", "between measured": " ~", BEYOND: " *"}
    rows = []
    for batch in BATCHES:
        cells = [cell(of, batch, devices, known) for devices in DEVICES]
        rows.append([batch, *(_said(each) + marks[each.how] for each in cells)])
    heads = ["views", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES)]
    return f"## {of.title}\n\n{markdown(heads, rows)}"


def _said(found: Cell) -> str:
    option = found.option
    shape = ""
    if option.window > 1:
        shape = f" {option.picard} x {option.data}" if option.data > 1 else f" {option.picard}"
        shape = shape if option.picard > 1 else ""
        shape += f" of {option.slots}" if option.slots > 1 else ""
        shape += ", joined" if option.joined and option.picard > 1 else ""
    elif option.data > 1:
        shape = f" {option.data}"
    ahead = f" ({found.margin:.1f} x {found.second})" if found.second else ""
    return f"{family(option)}{shape}: {number(1e3 * option.seconds)} ms, {found.speed:.1f} x{ahead}"


def figure(maps: list[Map], known: Mapping[int, float], out: Path) -> None:
    """Draws the maps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    drawing, axes = plt.subplots(2, 2, figsize=(10.5, 9.5), layout="constrained")
    for axis, of in zip(axes.flat, maps, strict=True):
        for y, batch in enumerate(BATCHES):
            for x, devices in enumerate(DEVICES):
                found = cell(of, batch, devices, known)
                style = {"facecolor": FAMILIES[family(found.option)], "edgecolor": "white"}
                hatch = "///" if found.how == BEYOND else None
                axis.add_patch(Rectangle((x, y), 1, 1, linewidth=2, hatch=hatch, **style))
                axis.text(x + 0.5, y + 0.62, f"{found.speed:.1f} x", ha="center", va="center")
                margin = f"by {found.margin:.1f}" if found.second else ""
                axis.text(x + 0.5, y + 0.28, margin, ha="center", va="center", fontsize=7.5)
        axis.set(xlim=(0, len(DEVICES)), ylim=(0, len(BATCHES)), title=of.title)
        axis.set_xticks([x + 0.5 for x in range(len(DEVICES))], map(str, DEVICES))
        axis.set_yticks([y + 0.5 for y in range(len(BATCHES))], map(str, BATCHES))
        axis.set_xlabel("devices")
        axis.set_ylabel("views a step")
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    handles = [Patch(facecolor=colour, label=name) for name, colour in FAMILIES.items()]
    handles.append(
        Patch(facecolor="white", edgecolor="grey", hatch="///", label="beyond measured batches")
    )
    drawing.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    drawing.savefig(out, dpi=100)
    plt.close(drawing)


NOTES = """
Who takes the fewest seconds a step, with what shape; times as fast as one device; and in brackets times as fast as the
best of another kind. *Picard 8 of 4, joined*: eight ranks that evaluate four slots each, whose calls are made once for
all four; *batched calls of 8*: one device that does so with eight. *Picard 4 x 2*: four ranks of two devices that
share a step's batch. Data parallelism is exact, running ahead is to within the default tolerance.

**Measured**: the seconds of a gradient by its views, those of the optimizer's steps ahead and of commits, and the
steps a sweep.

- GPU: a UNet of Stable Diffusion 2.1's size, {parameters:,} parameters, {gpu}: {gpu_points}.
- CPU: the shipped pixel model on one core, in the processor's time ({cpu}): {cpu_points}. There
  joined slots were measured too.

Strides: DreamFusion on voxels with the model that ships, default tolerance ({setting} of [rounds.md](rounds.md)):
{strides}.

**Modelled**: everything with more than one device, by `picardopt.planner`: nobody has run these on several GPUs.
Straight lines between measured points (~) and beyond the last of them (*), in batches and in windows. On the GPU joined
slots take what one gradient of all their views takes. CPU devices have a core each. Links:
{links}.
"""


def points_of(curve: Curve) -> str:
    return ", ".join(f"{size}: {number(1e3 * each)} ms" for size, each in curve.points.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="this CPU's curve")
    parser.add_argument("--seconds", type=float, default=240.0, help="for it, about")
    parser.add_argument("--out", type=Path, default=RESULTS / "winner_map.json")
    parser.add_argument("--image", type=Path, default=IMAGES / "winner_map.png")
    given = parser.parse_args()
    if given.measure:
        with processor_time():
            write_json(given.out, measure_cpu(given.seconds))
    found = json.loads(
        (given.out if given.out.exists() else RESULTS / "winner_map.json").read_text()
    )
    maps, known = [*gpu_maps(), cpu_map(found)], strides()
    links = "; ".join(f"{m.link.name} {m.link.bandwidth / 1e9:.3g} GB/s" for m in maps)
    notes = NOTES.format(
        gpu=maps[0].curve.source,
        gpu_points=points_of(maps[0].curve),
        parameters=GPU_PARAMETERS,
        cpu=found["machine"],
        cpu_points=points_of(maps[-1].curve),
        setting=SETTING,
        strides=", ".join(f"{w}: {known[w]:.1f}" for w in (1, 8, 16, 32, 64)),
        links=links,
    )
    tables = "\n\n".join(table(each, known) for each in maps)
    command = "python benchmarks/winner_map.py"
    text = document("Who wins", command, "No run: computed from measurements", notes, tables)
    given.out.with_suffix(".md").write_text(text)
    figure(maps, known, given.image)
    print(text)


if __name__ == "__main__":
    main()
