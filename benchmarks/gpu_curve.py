"""What one gradient takes against its batch: score distillation through UNets of published size, eager and compiled.

    python benchmarks/gpu_curve.py --out benchmarks/results/gpu_curve.json

`winner_map.py` reads the JSON. Every model runs eagerly at every batch; compiled, as each batch is compiled anew, at a
few of them.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from picardopt_3d.io import write_json
from tables import document, machine, markdown, number, publish
from unet_task import MODELS as UNETS
from unet_task import PARAMETERS, Distillation, Unet, milliseconds


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: Names of UNets.
        batches: Views a step.
        compiled: Views of the compiled runs.
        parameters: Of the scene.
        seconds: For each row, about; at least three steps are timed.
        device: Where.
        small: Tiny UNets, to check this script itself.
        out: JSON file; the table lies beside it.
    """

    models: tuple[str, ...] = tuple(UNETS)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    compiled: tuple[int, ...] = (1, 8)
    parameters: int = PARAMETERS
    seconds: float = 1.0
    device: str = "cuda"
    small: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Point:
    """Milliseconds of one gradient, rendering and backward included.

    Attributes:
        model: The UNet.
        compiled: Whether it was compiled.
        batch: Views.
        milliseconds: Of a step without the optimizer's.
    """

    model: str
    compiled: bool
    batch: int
    milliseconds: float


def measure(options: Options, unet: Unet, batch: int) -> float:
    """Returns the milliseconds of a gradient."""
    task = Distillation(unet, batch, options.parameters)
    once = milliseconds(task, 2, unet.device)  # compiles, and tries kernels
    once = milliseconds(task, 1, unet.device)
    count = max(3, min(50, int(1e3 * options.seconds / once)))
    return milliseconds(task, count, unet.device)


def curves(options: Options) -> list[Point]:
    """Measures all rows."""
    device, points = torch.device(options.device), []
    for model in options.models:
        for compiled in (False, True):
            batches = options.compiled if compiled else options.batches
            if not batches:
                continue
            unet = Unet(model, device, small=options.small, compiled=compiled)
            for batch in batches:
                point = Point(model, compiled, batch, measure(options, unet, batch))
                print(f"{model} {'compiled' if compiled else 'eager'} {point}", file=sys.stderr)
                points.append(point)
            del unet
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return points


def table(points: list[Point]) -> str:
    """Lays out the curves, a column for each batch."""
    batches = sorted({point.batch for point in points})
    rows = []
    for model, compiled in dict.fromkeys((point.model, point.compiled) for point in points):
        found = {
            p.batch: p.milliseconds for p in points if (p.model, p.compiled) == (model, compiled)
        }
        cells = [number(found[batch]) if batch in found else "" for batch in batches]
        rows.append([model, "compiled" if compiled else "eager", *cells])
    return markdown(["model", "", *(f"{batch} views" for batch in batches)], rows)


NOTES = """
Milliseconds of one gradient of score distillation with classifier-free guidance at 64 x 64 (a UNet call on twice the
views, half precision, random weights; *sd21* has Stable Diffusion 2.1's architecture, *if-xl* DeepFloyd IF-I-XL's), for
a scene of {parameters:,} parameters in a table of features; the optimizer's own step is not in it. Compiled: by
torch.compile with its defaults, anew for each batch.
"""


def main(options: Options) -> None:
    """Prints the table, and writes it."""
    where, points = machine(), curves(options)
    command = " ".join(["python benchmarks/gpu_curve.py", *sys.argv[1:]])
    notes = NOTES.format(parameters=options.parameters)
    text = document("A gradient against its batch", command, where, notes, table(points))
    if options.out is not None:
        content: dict[str, Any] = {"command": command, "machine": where}
        content["options"] = asdict(replace(options, out=None))
        write_json(options.out, content | {"points": [asdict(point) for point in points]})
    publish(text, options.out and options.out.with_suffix(".md"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
