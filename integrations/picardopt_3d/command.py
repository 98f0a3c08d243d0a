"""Command lines of runs: presets, YAML files and dotted options, in this order of precedence."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from picardopt_3d.cli_errors import cli_errors
from picardopt_3d.config import COMMANDS, RunConfig
from picardopt_3d.config_files import (
    build,
    find_method,
    find_preset,
    load_config,
    merged,
    only_first_stage,
    plain,
    read_yaml,
)
from picardopt_3d.methods import METHODS
from picardopt_3d.run.folder import RunFolder


def parse(command: str, argv: Sequence[str] | None, description: str) -> RunConfig[Any]:
    """Reads and checks a new run's arguments; prints what is wrong and exits with 2 if they cannot be used.

    `--method` and `--preset` choose the numbers to begin with, `--config FILE.yaml` (one that a run kept, or a part of
    one) overrides them, and every other option overrides that.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with cli_errors(command):
        default, rest = _begin_with(command, arguments)
        config = _cli(command, default, rest, description)
        config.check()
        config.check_new()
    return config


def parse_resume(argv: Sequence[str] | None) -> RunConfig[Any]:
    """Reads the arguments of `picardopt resume RUN`: the run's own configuration, with what may change in it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with cli_errors("resume"):
        run = _run_among(arguments)
        if run is None:
            if {"-h", "--help"} & set(arguments):
                print(f"usage: picardopt resume RUN [OPTION ...]\n\n{_RESUME}\n")
                print(
                    "RUN is the folder of a run. `picardopt resume RUN --help` lists the options that may change."
                )
                raise SystemExit(0)
            raise ValueError(f"{shlex.join(arguments) or 'no RUN'}: give the folder of a run")
        arguments.remove(run)
        default = dataclasses.replace(load_config(RunFolder(Path(run)).config), out=Path(run))
        config = _cli("resume", default, arguments, _RESUME)
        config.check()
        asked, was = config.task.title, default.task.title
        if asked != was:
            raise ValueError(
                f"{asked!r}: a run goes on with what it was asked for, {was!r}; leave it out, or start a new run"
            )
        for name in ("method", "preset"):
            if getattr(config, name) != getattr(default, name):
                raise ValueError(
                    f"{name}={getattr(config, name)!r}: a run goes on with its own {name}, "
                    f"{getattr(default, name)!r}; leave it out, or start a new run"
                )
    return config


def _run_among(arguments: Sequence[str]) -> str | None:
    """Finds the run folder among the arguments: the other options can be parsed only once its configuration is read."""
    folders = [each for each in arguments if not each.startswith("-") and Path(each).is_dir()]
    runs = [each for each in folders if RunFolder(Path(each)).config.is_file()]
    return next(iter(runs + folders), None)


def print_report(report: dict[str, Any], folder: RunFolder) -> None:
    """Prints in two lines what came of a run, and of several stages a line each."""
    psnr = report.get("psnr")
    quality = "" if psnr is None else f"; PSNR {psnr:.1f} dB against the true views"
    counts = "".join(
        f"; {report[name.lower()]:,} {name}"
        for name in report.get("counts", {})
        if name.lower() in report
    )
    joined, saved = report["joined_calls"], report["calls_saved"]
    shared = f"; {joined + saved} calls of the guidance made as {joined}" if joined else ""
    stages = "".join(f"  {_in_short(stage)}\n" for stage in report.get("stages", ()))
    print(
        f"{report['title']!r}: {report['steps']} steps in {report['sweeps']} sweeps"
        f" ({report['mean_stride']:.2f} steps a sweep) by {report['workers']} worker(s){shared}{counts};"
        f" {report['total_seconds']:.0f} s in all{quality}\n"
        f"{stages}"
        f"look at {folder.sheet} and {folder.film}, or open {folder.page} in a browser"
    )


def _in_short(stage: dict[str, Any]) -> str:
    """Returns what came of one of several stages."""
    quality = f"; PSNR {stage['psnr']:.1f} dB" if "psnr" in stage else ""
    return (
        f"{stage['name']}: {stage['steps_done']} of {stage['steps']} steps in {stage['sweeps']} sweeps, "
        f"{stage['seconds']:.0f} s{quality}"
    )


def text_to_3d(argv: Sequence[str] | None = None) -> None:
    """Runs the command `picardopt text-to-3d`: from a text to a folder with an object in it.

    Args:
        argv: The arguments after it; None: those of the process.

    Raises:
        SystemExit: 2 for arguments that cannot be used, 130 after Ctrl-C.
    """
    _run("text-to-3d", argv, f"Make a 3D object from a text, {_HOW}")


def image_to_3d(argv: Sequence[str] | None = None) -> None:
    """Runs the command `picardopt image-to-3d`: the same from a picture of the object."""
    _run("image-to-3d", argv, f"Make a 3D object from a picture of it, {_HOW}")


def resume(argv: Sequence[str] | None = None) -> None:
    """Runs the command `picardopt resume RUN`: goes on where a run was stopped."""
    started = time.time()
    config = parse_resume(argv)
    from picardopt_3d.run.pipeline import resume_checked

    _print_notes(_cautions(config))
    folder = RunFolder(config.out)
    with cli_errors("resume", partial(_goes_on, folder)):
        print_report(resume_checked(config, started), folder)


def _run(command: str, argv: Sequence[str] | None, description: str) -> None:
    """From arguments to a finished run."""
    started = time.time()
    config = parse(command, argv, description)
    # Only now: what renders and scores takes seconds to import, which a mistyped option should not cost.
    from picardopt_3d.run.pipeline import run_checked

    stages = [stage for _, stage in config.recipe.stages()]
    _print_notes([config.task.caution(stage.guidance) for stage in stages])
    _print_notes(_cautions(config))
    folder = RunFolder(config.out)
    with cli_errors(command, partial(_goes_on, folder)):
        print_report(run_checked(config, started), folder)


def _cautions(config: RunConfig[Any]) -> list[str | None]:
    """What makes a run inexact; a sequential one is what it is."""
    return [] if config.sequential else [stage.caution for _, stage in config.recipe.stages()]


def _print_notes(cautions: Sequence[str | None]) -> None:
    """Prints each caution once."""
    for caution in dict.fromkeys(cautions):
        if caution is not None:
            print(f"note: {caution}", file=sys.stderr)


def _goes_on(folder: RunFolder) -> str:
    """What to print after Ctrl-C."""
    if not folder.config.exists():
        return "nothing was written"
    return f"what was finished is in {folder.path}; `picardopt resume {shlex.quote(str(folder.path))}` goes on"


_HOW = (
    "several optimizer steps at a time. --method and --preset set defaults. --config FILE.yaml (a run's config.yaml "
    "or a part of it) overrides them, and options override both."
)
_RESUME = (
    "Continue a run from its last checkpoint, with any number of workers and any window. At tolerance 0 the result is "
    "bitwise that of the run without a stop."
)


def _begin_with(command: str, arguments: list[str]) -> tuple[RunConfig[Any], list[str]]:
    """The configuration that options are laid over, with holes that they must fill, and the arguments that are left.

    Raises:
        ValueError: A method, preset or key is unknown, or a value cannot be used.
        FileNotFoundError: There is no such YAML file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(arguments)
    content = {} if known.config is None else read_yaml(known.config)
    if content.pop("command", command) != command:
        raise ValueError(f"{known.config} is a configuration of another command")
    name = known.method or content.get("method") or next(iter(METHODS[command]))
    method = find_method(name, command)
    preset = known.preset or content.get("preset") or "small"
    numbers = content.get("recipe") or {}
    if not isinstance(numbers, dict):
        raise ValueError(
            f"{known.config}: recipe={numbers!r}: give a mapping, such as 'recipe: {{batch: 2}}'"
        )
    stage = only_first_stage(method, numbers, str(known.config))
    if stage is not None:
        numbers = {stage.name: numbers}
    recipe = merged(plain(find_preset(preset, method)), numbers)
    content |= {"method": name, "preset": preset, "recipe": recipe}
    kind, holes = COMMANDS[command], {}
    for item in dataclasses.fields(kind):
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in content:
            holes[item.name] = tyro.MISSING
    values = content | dict.fromkeys(holes, "to be filled")
    default = build(kind, method.config, values, str(known.config or f"preset {preset}"))
    return dataclasses.replace(default, **holes), rest


def _cli(
    command: str, default: RunConfig[Any], arguments: Sequence[str], description: str
) -> RunConfig[Any]:
    """Lays options over a configuration."""
    kind: Any = type(default)
    config: RunConfig[Any] = tyro.cli(
        kind[type(default.recipe)],
        default=default,
        args=arguments,
        prog=f"picardopt {command}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )
    return config
