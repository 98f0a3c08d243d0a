"""The runs of `prompts.py` and the tables made from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picardopt_3d.world import COLOURS, SHAPES, all_subjects, held_out_subjects
from tables import markdown, mean

HELD_OUT = tuple(subject.caption for subject in held_out_subjects())
PROMPTS = (
    "a orange sphere",
    "a red cube",
    "a purple cylinder",
    "a yellow cone",
    "a blue chair",
    "a cyan mug",
    "a green snowman",
    "a brown torus",
    "a red chair",
    "a yellow snowman",
)
"""Every shape and every colour; the last three are held out of the training of the guidance model."""
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "tolerance 0": {"window": 2, "tolerance": 0},
    "default": {"window": 8},
}
"""What the optimizer is given. At tolerance 0 a wider window changes nothing but the work that is thrown away."""


@dataclass(frozen=True)
class Run:
    """One run."""

    prompt: str
    seed: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.prompt}/seed {self.seed}/{self.kind}"

    def file(self, folder: Path, ending: str) -> Path:
        """Where something of the run is kept."""
        return folder / f"{self.prompt.replace(' ', '-')}-{self.seed}-{self.kind}.{ending}"


def reference_of(run: Run) -> Run:
    """The sequential run of the same prompt and seed."""
    return Run(run.prompt, run.seed, "sequential")


def count(values: Iterable[bool]) -> str:
    """How many of them are true, such as 5/5."""
    found = list(values)
    return f"{sum(found)}/{len(found)}" if found else ""


class Results:
    """The runs so far, and the figures made from them.

    Args:
        runs: From the JSON, by name.
        spreads: Of each prompt, from the JSON.
        seeds: How many there are.
    """

    def __init__(self, runs: dict[str, Any], spreads: dict[str, float], seeds: int) -> None:
        self.runs, self.spreads, self.seeds = runs, spreads, seeds

    def of(self, prompts: Iterable[str], kind: str, key: str) -> list[Any]:
        """One figure of all runs of a kind."""
        names = [Run(p, s, kind).name for p in prompts for s in range(self.seeds)]
        return [self.runs[n][key] for n in names if key in self.runs.get(n, {})]

    def once(self, prompts: Iterable[str], key: str) -> list[Any]:
        """One figure of the default run with seed 0 of each prompt."""
        names = [Run(p, 0, "default").name for p in prompts]
        return [self.runs[n][key] for n in names if n in self.runs]

    def differences(self, prompts: Iterable[str], kind: str) -> list[float]:
        """Absolute PSNR differences of the pairs."""
        pairs = [Run(p, s, kind) for p in prompts for s in range(self.seeds)]
        found = [(self.runs.get(r.name), self.runs.get(reference_of(r).name)) for r in pairs]
        return [abs(one["psnr"] - other["psnr"]) for one, other in found if one and other]

    def deviations(self, prompts: Iterable[str], kind: str) -> list[float]:
        """Deviations of the parameters in % of the spread of the seeds."""
        return [
            100 * apart / self.spreads[prompt]
            for prompt in prompts
            if prompt in self.spreads
            for apart in self.of([prompt], kind, "parameters")
        ]

    def row(self, name: str, prompts: tuple[str, ...]) -> list[str]:
        """A line of the table over prompts."""
        return [
            name,
            *(mean(self.of(prompts, kind, "psnr")) for kind in KINDS),
            mean(self.differences(prompts, "default"), "{:.3f}"),
            *(count(self.of(prompts, kind, "right")) for kind in KINDS),
            count(self.of(prompts, "tolerance 0", "bitwise")),
            *(mean(self.of(prompts, k, "steps_per_sweep")) for k in ("tolerance 0", "default")),
            mean(self.deviations(prompts, "default"), "{:.1f}"),
        ]

    def table(self) -> str:
        """The table over prompts and seeds."""
        psnrs = [f"PSNR, {kind}" for kind in KINDS]
        heads = ["prompt", *psnrs, "default apart, dB", *(f"CLIP, {kind}" for kind in KINDS)]
        heads += ["bitwise", "steps a sweep, tolerance 0", "default", "deviation, %"]
        rows = [self.row(p + (" (held out)" if p in HELD_OUT else ""), (p,)) for p in PROMPTS]
        return markdown(heads, [*rows, self.row("all", PROMPTS)])

    def targets(self) -> str:
        """Returns the table of targets and what was reached."""
        everyone = [subject.caption for subject in all_subjects()]
        trained = [prompt for prompt in everyone if prompt not in HELD_OUT]
        own = self.once(trained, "psnr")
        others = self.once(HELD_OUT, "psnr")
        views = self.once(everyone, "right_views")
        apart = self.differences(PROMPTS, "default")
        least = f"; least {min(own):.2f}" if own else ""
        rows = [
            [f"mean PSNR, {len(own)} trained pairs", "20 dB", mean(own) + " dB" + least],
            [f"mean PSNR, {len(others)} held-out pairs", "within 2 dB", mean(others) + " dB"],
            ["CLIP chooses the prompt's caption", "90 %", count(self.once(everyone, "right"))],
            ["the same of single views", "", mean((100 * v for v in views), "{:.1f} %")],
            ["bitwise at tolerance 0", "all", count(self.of(PROMPTS, "tolerance 0", "bitwise"))],
            [
                f"mean absolute PSNR difference, {len(apart)} pairs",
                "0.2 dB",
                mean(apart, "{:.3f} dB"),
            ],
            ["largest of them", "", f"{max(apart):.3f} dB" if apart else ""],
        ]
        return "## Targets\n\n" + markdown(["figure", "target", "found"], rows)

    def grid(self) -> str:
        """PSNR of every prompt of the built-in world."""
        rows = [[shape, *(self.cell(f"a {c} {shape}") for c in COLOURS)] for shape in SHAPES]
        return "## All prompts, seed 0, at the defaults\n\n" + markdown(["PSNR", *COLOURS], rows)

    def cell(self, prompt: str) -> str:
        """PSNR, with marks."""
        found = self.runs.get(Run(prompt, 0, "default").name)
        if found is None:
            return ""
        chosen = "" if found["right"] else f" (seen as {found['chosen'][2:]})"
        return f"{found['psnr']:.1f}" + ("*" if prompt in HELD_OUT else "") + chosen


NOTES = """
The text-to-3D recipe as it ships (batch 4, learning rate 0.04, the shipped pixel model), but {steps} steps; {seeds}
seeds of each prompt, paired: the three runs of a seed see the same random numbers. *Tolerance 0* has a window of 2,
*default* is the default tolerance with a window of 8, which eight devices would have. *PSNR* is that of 32 held-out
views against the true ones, dB; *default apart* is the mean absolute difference from the sequential run of the same
seed. *CLIP* is R-precision: the share of the objects of which the shipped CLIP, from the mean over 8 azimuths, prefers
the prompt's caption to those of the 63 other pairs of shape and colour. *Bitwise* counts runs whose parameters,
optimizer state and losses have the sequential run's bits. *Steps a sweep* is the ceiling of the speed-up. *Deviation*
is the distance of the final parameters from those of the sequential run, in % of the median distance of two seeds.
*Held out* (* in the last table): pairs of shape and colour that the guidance model did not see in its training.
"""


def body(content: dict[str, Any]) -> tuple[str, str]:
    """Notes and tables of the document."""
    setup, runs = content["setup"], content["runs"]
    results = Results(runs, content.get("spreads", {}), setup["seeds"])
    cpu = sum(run["optimization_cpu_seconds"] for run in runs.values()) / 60
    ending = f"{len(runs)} runs, {cpu:.0f} CPU minutes of optimization."
    text = "\n\n".join([results.table(), results.targets(), results.grid(), ending])
    return NOTES.format(**setup), text
