"""Runs a training script that uses ParallelPicardOptimizer four ways, and compares what they trained.

One step after the other (the loop that picardopt replaces), running ahead at tolerance 0, and running ahead as the
script says; and, to say what a distance means, one step after the other with other random draws in its steps and
another order of batches. The script itself is not changed; it is run whole, with the arguments that follow its name:

    python integrations/adapters/check.py --window 8 train.py --its own --arguments
    python integrations/adapters/check.py --processes 2 train.py --its own --arguments

It prints a table, and fails where tolerance 0 did not give the same bits: of parameters, optimizer state and losses.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import picardopt
from picardopt import ParallelPicardOptimizer, StepIndexedLoader, step_rng
from picardopt.closure import Plain, as_step_closure
from picardopt.drift import map_tensors

WAYS = ("in order", "tolerance 0", "as it is", "another seed")


@dataclass
class Run:
    """What a way of running a script trained.

    Attributes:
        initial: The parameters before the first step.
        parameters: The parameters after the last.
        state: The base optimizer's tensors and numbers.
        losses: The tensors that each step returned.
        sweeps: How often a window was evaluated; 0 in order.
    """

    initial: list[Tensor]
    parameters: list[Tensor] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)
    sweeps: int = 0

    def same(self, other: Run) -> bool:
        """Whether every bit is the same."""
        mine, its = (tree_leaves((run.parameters, run.state, run.losses)) for run in (self, other))
        return len(mine) == len(its) and all(map(same_bits, mine, its))

    def distance(self, other: Run) -> float:
        """How far its parameters are from another run's, in the way that the other one went."""
        apart = sum(
            float((a - b).square().sum())
            for a, b in zip(self.parameters, other.parameters, strict=True)
        )
        way = sum(
            float((a - b).square().sum())
            for a, b in zip(other.parameters, other.initial, strict=True)
        )
        return (apart / way) ** 0.5


def same_bits(a: Any, b: Any) -> bool:
    """Returns whether two tensors are the same to the last bit, or two other values are equal."""
    if not isinstance(a, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, other = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def watched(way: str, window: int | None, runs: list[Any]) -> type[ParallelPicardOptimizer]:
    """Returns the class that the script gets in place of ParallelPicardOptimizer.

    Args:
        way: One of `WAYS`.
        window: Replaces the script's window, if given.
        runs: Receives a pair for each optimizer that the script makes: the object and its `Run`.
    """
    in_order = way in ("in order", "another seed")

    class Watched(ParallelPicardOptimizer):
        def __init__(self, base: Any, **options: Any) -> None:
            if window is not None:
                options["window"] = window
            if in_order:
                options["window"] = 1
            if way == "another seed":
                options["seed"] = options.get("seed", 0) + 1
            if way == "tolerance 0":
                options["tolerance"] = 0
            super().__init__(base, **options)
            self.run = Run([p.detach().clone() for p in parameters_of(self)])
            runs.append((self, self.run))

        def step(self, closure: Any = None) -> Any:
            given = as_step_closure(closure)
            if not in_order or isinstance(given, Plain):
                returned = super().step(closure)
            else:  # the loop that picardopt replaces
                with step_rng(self.seed, self.step_index), torch.enable_grad():
                    returned = given.call(self.step_index)
                    self.base.step()
                returned = map_tensors(Tensor.detach, returned)
                self.step_index += 1
                self.stats.steps += 1
            self.run.losses.append([v.detach().clone() for v in tree_leaves(returned)])
            return returned

    return Watched


class Reordered(StepIndexedLoader):
    """The batches of another seed."""

    def __init__(self, loader: Any, *, seed: int = 0) -> None:
        super().__init__(loader, seed=seed + 1)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns an optimizer's parameters, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def run_script(script: Path, way: str, window: int | None, out: Path) -> None:
    """Runs a script as `python script ...` does, and saves what its last optimizer trained (rank 0's)."""
    runs: list[Any] = []
    path, names = list(sys.path), ("ParallelPicardOptimizer", "StepIndexedLoader")
    originals = [getattr(picardopt, name) for name in names]
    loader = Reordered if way == "another seed" else StepIndexedLoader
    for name, value in zip(names, (watched(way, window, runs), loader), strict=True):
        setattr(picardopt, name, value)
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        for name, value in zip(names, originals, strict=True):
            setattr(picardopt, name, value)
        sys.path[:] = path
    if not runs:
        raise SystemExit(f"{script} made no ParallelPicardOptimizer")
    optimizer, run = runs[-1]
    run.parameters = [p.detach().clone() for p in parameters_of(optimizer)]
    run.state = tree_leaves(optimizer.base.state_dict())
    run.sweeps = optimizer.stats.sweeps
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(vars(run), out)


def start(options: argparse.Namespace, way: str, out: Path) -> Run:
    """Runs the script in processes of its own, and returns what it trained."""
    launcher = [sys.executable]
    if options.processes > 1 and way in ("tolerance 0", "as it is"):
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(options.processes)]
    command = [*launcher, str(Path(__file__).resolve()), "--way", way, "--out", str(out)]
    if options.window is not None:
        command += ["--window", str(options.window)]
    print(f"--- {way}", flush=True)
    subprocess.run([*command, str(options.script), *options.arguments], check=True)
    return Run(**torch.load(out))


def compare(options: argparse.Namespace) -> bool:
    """Runs the script all four ways and prints the table; returns whether tolerance 0 gave the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {way: start(options, way, Path(folder, f"{i}.pt")) for i, way in enumerate(WAYS)}
    order = runs["in order"]
    exact = runs["tolerance 0"].same(order)
    print(
        f"\n| {'way':<12} | steps | sweeps | steps per sweep | against one step after the other |"
    )
    print("| --- | --- | --- | --- | --- |")
    for way, run in runs.items():
        steps = len(run.losses)
        pace = f"{steps / run.sweeps:.2f}" if run.sweeps else ""
        if way == "in order":
            text = ""
        elif run.same(order):
            text = "the same bits"
        else:
            percent = 100 * run.distance(order)
            text = f"{percent:.{0 if percent >= 10 else 1}f} % of the way trained"
        print(f"| {way:<12} | {steps:>5} | {run.sweeps or '':>6} | {pace:>15} | {text} |")
    return exact


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--window", type=int, help="in place of the script's window")
    parser.add_argument("--processes", type=int, default=1, help="that share the window (torchrun)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.way is None:
        sys.exit(0 if compare(options) else "tolerance 0 did not give the same bits")
    sys.argv = [str(options.script), *options.arguments]
    run_script(options.script, options.way, options.window, options.out)


if __name__ == "__main__":
    main()
