"""The command `picardopt plan`: what a recipe's steps would take on several devices, and the best way to use them.

It takes the recipe's first steps on one device, with a window, and evaluates them at smaller batches too. Nothing of
that is kept but `plan.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from picardopt.links import LINKS
from picardopt_3d.cli_errors import cli_errors
from picardopt_3d.command import parse
from picardopt_3d.config import COMMANDS, RunConfig
from picardopt_3d.io import write_json
from picardopt_3d.run.folder import RunFolder

WINDOW, STEPS, DEVICES = 8, 48, 8
"""Of the steps that are taken: their window, unless the command or the recipe names one, and their number; and the
number of devices to plan for."""
_HOW = f"""usage: picardopt plan {{{",".join(COMMANDS)}}} ... [--devices N] [--link NAME] [--probe N]

Predicts how long a step of a run would take on several devices, and says what is best: one device, data parallelism,
or running ahead. It takes the recipe's first steps here, on one device, and writes OUT/plan.json.

  --devices N   devices to plan for (default {DEVICES})
  --link NAME   what joins them: {", ".join(LINKS)} (default nvlink)
  --probe N     steps to take (default {STEPS})

All other arguments are those of the run: see `picardopt {next(iter(COMMANDS))} --help`.
"""


class PlanOptions(NamedTuple):
    """The command's own options.

    Attributes:
        devices: Number of devices to plan for.
        link: What joins them, a name of `picardopt.links.LINKS`.
        probe: Number of steps to take.
    """

    devices: int = DEVICES
    link: str = "nvlink"
    probe: int = STEPS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt plan`; None: those of the process.

    Raises:
        SystemExit: 2 for arguments that cannot be used, 130 after Ctrl-C.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_HOW, end="")
        return
    with cli_errors("plan"):
        if command not in COMMANDS:
            raise ValueError(
                f"{command!r}: give one of {', '.join(COMMANDS)}, and then its arguments"
            )
        options, rest = _own_options(rest)
    config = parse(command, rest, _HOW)
    with cli_errors("plan"):
        print(make_plan(config, options))


def _own_options(arguments: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """Returns the command's own options, and the arguments that are the run's.

    Raises:
        ValueError: A number is too small.
    """
    parser = argparse.ArgumentParser("picardopt plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--link", choices=tuple(LINKS), default="nvlink")
    parser.add_argument("--probe", type=int, default=STEPS)
    known, rest = parser.parse_known_args(arguments)
    options = PlanOptions(known.devices, known.link, known.probe)
    for name in ("devices", "probe"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: give a positive number")
    return options, rest


def make_plan(config: RunConfig[Any], options: PlanOptions) -> str:
    """Takes a run's first steps, plans, writes `plan.json` and returns what to print.

    Args:
        config: The run's options.
        options: The command's own.

    Raises:
        ValueError: An option cannot be used, or the steps are too few.
        FileNotFoundError: A model or a picture cannot be had.
    """
    # Only now: what renders and scores takes seconds to import, which a mistyped option should not cost.
    import torch

    from picardopt import plan
    from picardopt_3d.methods.schedules import current

    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        (name, stage), *later = config.recipe.stages()
        problem, optimizer, closure = first_steps(config, options.probe)
        batch = current(stage.batch, min(optimizer.step_index, stage.steps - 1))
        closures = evaluations(problem, closure, _parts(batch))
        found = plan(optimizer, closures, options.devices, link=LINKS[options.link])
    finally:
        torch.set_num_threads(before)
    taken = f"the first {optimizer.step_index} steps"
    if later:
        taken += f" of stage {name}"
    changing = [key for key in ("batch", "pixels") if not isinstance(getattr(stage, key), int)]
    notes = f"\nnote: {' and '.join(changing)} change later; this is of {taken}" if changing else ""
    content = {"title": config.task.title, "method": config.method, "preset": config.preset}
    write_json(RunFolder(config.out).plan, content | {"of": taken} | found.as_dict())
    return f"{config.task.title!r}, {config.method}, {taken}:\n\n{found}{notes}"


def first_steps(config: RunConfig[Any], steps: int) -> tuple[Any, Any, Callable[[int], Any]]:
    """Takes the first steps of a run's first stage.

    Args:
        config: The run's options.
        steps: Their number.

    Returns:
        The problem, the optimizer and the closure.
    """
    from tqdm import tqdm

    from picardopt_3d.devices import pick_device
    from picardopt_3d.methods import stage_seed
    from picardopt_3d.picard import PicardOptions, make_optimizer
    from picardopt_3d.run.loop import closure_of
    from picardopt_3d.run.prepare import build_problem

    stage, seed = config.recipe.stages()[0].config, stage_seed(config.seed, 0)
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        picture = RunFolder(Path(folder)).input
        config.task.prepare(picture)
        problem = build_problem(stage, config.task, picture, device, seed)
    window = config.window or stage.picard.window or WINDOW
    picard = PicardOptions(stage.picard, window, config.tolerance, config.predictor, config.secants)
    optimizer = make_optimizer(problem, picard, stage.steps, seed)
    closure, scheduler = closure_of(problem), problem.lr_scheduler()
    for _ in tqdm(range(min(steps, stage.steps)), "steps", leave=False, file=sys.stderr):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    return problem, optimizer, closure


def _parts(batch: int) -> list[int]:
    """Returns a batch, and its parts for 2, 4, 8, ... devices as far as they are equal."""
    parts = [batch]
    while parts[-1] % 2 == 0:
        parts.append(parts[-1] // 2)
    return parts if parts[-1] == 1 else [*parts, 1]


def evaluations(
    problem: Any, closure: Callable[[int], Any], batches: Sequence[int]
) -> dict[int, Callable[[int], Any]]:
    """Returns the closures of a problem with other numbers of views.

    Args:
        problem: What is trained.
        closure: Of its steps.
        batches: Numbers of views.
    """
    return {batch: _of_batch(problem, closure, batch) for batch in batches}


def _of_batch(problem: Any, closure: Callable[[int], Any], batch: int) -> Callable[[int], Any]:
    """Returns the closure of a problem with another number of views."""

    def evaluate(step: int) -> Any:
        config = problem.config
        problem.config = replace(config, batch=batch)
        try:
            return closure(step)
        finally:
            problem.config = config

    return evaluate
