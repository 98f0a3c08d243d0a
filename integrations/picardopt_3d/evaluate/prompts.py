"""The prompts that pictures are matched to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from picardopt_3d.run.finished import FinishedRun
from picardopt_3d.task import yardstick_of

WORLD = "domain"
"""Stands for the built-in world in place of a file or a folder."""


def gather_prompts(runs: Sequence[FinishedRun], more: Sequence[str] = ()) -> list[str]:
    """Returns the prompts of all runs, then others, without repeated meanings."""
    first: dict[str, str] = {}
    for prompt in [*(run.prompt for run in runs if run.prompt is not None), *more]:
        first.setdefault(meaning_of(prompt), prompt)
    return list(first.values())


def read_prompts(source: str) -> list[str]:
    """Reads prompts from a file, one per line ("#" starts a comment), or returns those of the built-in world.

    Args:
        source: A text file, or "domain" for the 64 captions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no prompt, or is not a text file.
    """
    if source == WORLD:
        # Imported here because only "domain" needs the built-in world.
        from picardopt_3d.world import all_subjects

        return [subject.caption for subject in all_subjects()]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={source!r}: there is no such file; give a text file with one prompt per line, or {WORLD!r}"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts={source!r} is not a text file ({error}); give one in UTF-8"
        ) from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts={source!r} holds no prompt: write one per line")
    return prompts


def meaning_of(prompt: str) -> str:
    """Returns a normal form of a prompt; prompts with the same meaning have the same one."""
    known = yardstick_of(prompt)
    return " ".join(prompt.casefold().split()) if known is None else known.caption
