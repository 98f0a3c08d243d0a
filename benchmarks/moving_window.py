"""The pictures that move: a real run's window, sweep by sweep, and the object that comes of it.

    python benchmarks/moving_window.py                                   # a film: docs/images/window.webp
    python benchmarks/moving_window.py --drawing --preset small-nerf     # a drawing: docs/images/window.svg

Takes the steps of `picardopt text-to-3d "a blue chair" --window 8` in this process. The film shows the object beside
the window, with views rendered after every sweep; the drawing shows the first sweeps alone, slot by slot.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.export.pictures import to_pixels
from picardopt_3d.io import replacing
from picardopt_3d.methods import METHODS
from picardopt_3d.problem import Losses
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.loop import train
from picardopt_3d.run.prepare import prepared_stages
from picardopt_3d.run.record import Recorder
from picardopt_3d.scenes import Scene
from PIL import Image, ImageDraw, ImageFont

VIEW = 256
"""Pixels along an edge of the object's view."""
WIDTH = 768
DEGREES = 6
"""By which the object turns from frame to frame."""
PAUSE = 130
"""Milliseconds of a frame; a sweep has two of them."""
COLOURS = {
    "later": "#d9dee4",
    "guess": "#3f7fd0",
    "refused": "#f08c2e",
    "final": "#2e9e6b",
    "text": "#24292f",
    "faint": "#6b7580",
}
DRAWN = 8
"""Sweeps of the drawing."""
BEAT = 1.5
"""Seconds of a sweep in the drawing."""


@dataclass(frozen=True)
class Swept:
    """One sweep of the run.

    Attributes:
        head: Its first step.
        slots: Steps that it evaluated.
        stride: Steps that it made final.
    """

    head: int
    slots: int
    stride: int

    def kind(self, step: int, decided: bool) -> str:
        """What a step is in this sweep: before or after it is decided."""
        if step < self.head + (self.stride if decided else 0):
            return "final"
        if step >= self.head + self.slots:
            return "later"
        return "refused" if decided else "guess"


def trained(options: argparse.Namespace) -> tuple[list[Swept], list[Image.Image]]:
    """Takes the run's steps; returns its sweeps, and for a film two views of each and those of a turn at the end."""
    recipe = METHODS["text-to-3d"]["dreamfusion"].presets[options.preset]
    views: list[Image.Image] = []
    with tempfile.TemporaryDirectory() as folder:
        config = TextTo3DConfig(
            prompt=options.prompt,
            method="dreamfusion",
            preset=options.preset,
            recipe=recipe,
            out=Path(folder),
            window=options.window,
        )
        prepared = next(prepared_stages(config, resume=False))
        problem, optimizer = prepared.problem, prepared.optimizer
        distance, fov = prepared.config.cameras.middle

        def look(count: int) -> None:
            for _ in range(0 if options.drawing else count):
                azimuth = len(views) * DEGREES
                views.append(view_of(problem.scene, azimuth, distance, fov, options.size))

        def view(step: int, losses: Losses) -> None:
            last = optimizer.stats.records[-1]
            if step + 1 == last.step + last.stride:
                look(2)

        recorder = Recorder(prepared.record, problem, optimizer, time.time())
        steps = min(options.steps or prepared.config.steps, prepared.config.steps)
        train(problem, optimizer, recorder, steps, view, lambda: None)
        sweeps = [Swept(each.step, each.slots, each.stride) for each in optimizer.stats.records]
        look(2 * len(sweeps) + 360 // DEGREES - len(views))
    return sweeps, views


def view_of(scene: Scene, azimuth: float, distance: float, fov: float, size: int) -> Image.Image:
    """Renders the object from one side."""
    turns = 360 // DEGREES
    cameras = turntable_cameras(turns, distance=distance, fov=fov)
    index = round(azimuth / DEGREES) % turns
    with torch.no_grad():
        (pixels,) = to_pixels(render_rgb(scene, cameras[index : index + 1], size))
    return Image.fromarray(pixels)


def film(sweeps: list[Swept], views: list[Image.Image]) -> Iterator[Image.Image]:
    """Frames of the film: two for each sweep, then the turn at the end."""
    total = sweeps[-1].head + sweeps[-1].stride
    for index, view in enumerate(views):
        number = min(index // 2, len(sweeps) - 1)
        decided = index % 2 == 1 or index >= 2 * len(sweeps)
        yield frame(sweeps[number], number + 1, decided, total, view)


def frame(sweep: Swept, number: int, decided: bool, total: int, view: Image.Image) -> Image.Image:
    """One frame: the object, the window, and how far one step at a time would be."""
    picture = Image.new("RGB", (WIDTH, VIEW), "white")
    picture.paste(view.resize((VIEW, VIEW), Image.Resampling.LANCZOS), (0, 0))
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(size=19), ImageFont.load_default(size=15)
    left, right = VIEW + 24, WIDTH - 24
    done = sweep.head + (sweep.stride if decided else 0)
    draw.text((left, 22), f"sweep {number}", fill=COLOURS["text"], font=large)
    draw.text(
        (right, 22),
        f"{done} of {total} steps final",
        fill=COLOURS["final"],
        font=large,
        anchor="ra",
    )
    first, pitch = sweep.head - 6, 24
    for index in range((right - left) // pitch):
        step, x = first + index, left + index * pitch
        if 0 <= step < total:
            colour = COLOURS[sweep.kind(step, decided)]
            draw.rounded_rectangle((x, 66, x + pitch - 5, 88), 4, fill=colour)
    ahead = left + 6 * pitch
    box = (ahead - 4, 60, ahead + sweep.slots * pitch - 2, 94)
    draw.rounded_rectangle(box, 7, outline=COLOURS["text"], width=2)
    draw.text(
        (ahead, 98), f"window: {sweep.slots} gradients at once", fill=COLOURS["faint"], font=small
    )
    bars = (
        ("running ahead", done, "final", 140),
        ("one step at a time, same rounds", number, "faint", 192),
    )
    for label, value, colour, y in bars:
        draw.text((left, y), f"{label}: step {value}", fill=COLOURS["text"], font=small)
        draw.rounded_rectangle((left, y + 22, right, y + 34), 6, fill=COLOURS["later"])
        end = left + 12 + (right - left - 12) * value / total
        draw.rounded_rectangle((left, y + 22, end, y + 34), 6, fill=COLOURS[colour])
    return picture


class Drawing:
    """An SVG that moves by itself: shapes, and the values that their attributes have from each time on.

    Args:
        seconds: Of one round, which repeats.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rules, self.shapes = seconds, list[str](), list[str]()

    def add(self, shape: str, attribute: str, values: list[tuple[float, str]]) -> None:
        """Adds a shape, whose closing is left out, and its animation; where nothing may move it shows its end.

        Args:
            shape: Its element, up to the place of its class.
            attribute: What changes.
            values: Times, seconds, and what the attribute is from then on.
        """
        name = f"m{len(self.shapes)}"
        marks = [f"{100 * at / self.seconds:.2f}%{{{attribute}:{value}}}" for at, value in values]
        self.rules.append(
            f"@keyframes {name}{{{''.join(marks)}}}"
            f".{name}{{{attribute}:{values[-1][1]};animation:{name} {self.seconds:g}s step-end infinite}}"
        )
        self.shapes.append(shape.replace(" ", f' class="{name}" ', 1))

    def svg(self, width: int, height: int, label: str) -> str:
        """The whole file."""
        text = f"text{{font:16px system-ui,sans-serif;fill:{COLOURS['text']}}}"
        still = "@media(prefers-reduced-motion:reduce){*{animation:none!important}}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{label}"><style>{text}{"".join(self.rules)}{still}</style>'
            f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>{"".join(self.shapes)}</svg>\n'
        )


def drawing(sweeps: list[Swept], window: int) -> str:
    """The first sweeps, slot by slot, and below them one step at a time."""
    sweeps = sweeps[:DRAWN]
    last, seconds = sweeps[-1], BEAT * (len(sweeps) + 1)
    steps, pitch, left = last.head + last.stride, 17, 16
    width, decided = max(2 * left + steps * pitch, 560), 0.6 * BEAT
    made = Drawing(seconds)
    for step in range(steps):
        ahead = [(0.0, COLOURS["later"])]
        for index, sweep in enumerate(sweeps):
            ahead.append((index * BEAT, COLOURS[sweep.kind(step, False)]))
            ahead.append((index * BEAT + decided, COLOURS[sweep.kind(step, True)]))
        alone = [(0.0, COLOURS["later"])]
        if step < len(sweeps):
            alone.append((step * BEAT + decided, COLOURS["faint"]))
        box = f'x="{left + step * pitch}" width="{pitch - 3}" height="20" rx="3"/>'
        made.add(f'<rect y="62" {box}', "fill", changes(ahead))
        made.add(f'<rect y="132" {box}', "fill", alone)
    moves = [(i * BEAT, f"translateX({s.head * pitch}px)") for i, s in enumerate(sweeps)]
    edge = f'fill="none" stroke="{COLOURS["text"]}" stroke-width="2"'
    frame = f'<rect x="{left - 4}" y="57" width="{window * pitch + 5}" height="30" rx="6" {edge}/>'
    made.add(frame, "transform", moves)
    for index, sweep in enumerate(sweeps):
        text = (
            f"sweep {index + 1} makes {sweep.stride} of {sweep.slots} steps final: "
            f"{sweep.head + sweep.stride} steps in {index + 1} round{'s' * (index > 0)}"
        )
        values = [(0.0, "0"), (index * BEAT, "1"), ((index + 1) * BEAT, "0")]
        values = values[index == 0 : 3 if index + 1 < len(sweeps) else 2]
        made.add(f'<text x="{left}" y="30">{text}</text>', "opacity", values)
    made.shapes.append(f'<text x="{left}" y="122">one step at a time, in as many rounds</text>')
    return made.svg(width, 170, f"A window of {window} steps, sweep by sweep")


def changes(values: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The entries that differ from the one before; of several at one time the last."""
    latest = dict(values)
    kept: list[tuple[float, str]] = []
    for entry in latest.items():
        if not kept or entry[1] != kept[-1][1]:
            kept.append(entry)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="a blue chair")
    parser.add_argument("--preset", choices=("small", "small-nerf"), default="small")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--drawing", action="store_true", help="of the first sweeps, not a film")
    parser.add_argument("--steps", type=int, help="of the run; default: all, or what is drawn")
    parser.add_argument("--size", type=int, default=VIEW, help="pixels of a rendered view's edge")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    options = parser.parse_args()
    if options.drawing and options.steps is None:
        options.steps = DRAWN * options.window
    torch.set_num_threads(1)
    sweeps, views = trained(options)
    if options.drawing:
        with replacing(options.out / "window.svg") as temporary:
            temporary.write_text(drawing(sweeps, options.window))
    else:
        frames = list(film(sweeps, views))
        pauses = [PAUSE] * (len(frames) - 1) + [1500]
        how = {"save_all": True, "loop": 0, "quality": 60, "method": 6}
        with replacing(options.out / "window.webp") as temporary:
            first, *rest = frames
            first.save(temporary, format="WEBP", append_images=rest, duration=pauses, **how)
    strides = " ".join(str(sweep.stride) for sweep in sweeps)
    print(f"{sweeps[-1].head + sweeps[-1].stride} steps in {len(sweeps)} sweeps: {strides}")


if __name__ == "__main__":
    main()
