"""The prompts that pictures choose from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from picardopt_3d.run.finished import FinishedRun
from picardopt_3d.task import yardstick_of

WORLD = "domain"
"""Stands for the built-in world, where a file or a folder could be named."""


def gather_prompts(runs: Sequence[FinishedRun], more: Sequence[str] = ()) -> list[str]:
    """Returns the prompts of all runs, then others, each meaning once."""
    first: dict[str, str] = {}
    for prompt in [*(run.prompt for run in runs if run.prompt is not None), *more]:
        first.setdefault(meaning_of(prompt), prompt)
    return list(first.values())


def read_prompts(source: str) -> list[str]:
    """Reads prompts from a file, one a line ("#" begins a comment), or takes those of the built-in world.

    Args:
        source: A text file, or "domain" for the 64 captions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no prompt in it, or is no text.
    """
    if source == WORLD:
        # Here, not above: only who names the built-in world needs it.
        from picardopt_3d.world import all_subjects

        return [subject.caption for subject in all_subjects()]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={source!r}: there is no such file; give a text file with a prompt a line, or {WORLD!r}"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={source!r} is no text file: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts={source!r} has no prompt in it: write one a line")
    return prompts


def meaning_of(prompt: str) -> str:
    """Returns what two prompts have in common that ask for the same."""
    known = yardstick_of(prompt)
    return " ".join(prompt.casefold().split()) if known is None else known.caption
