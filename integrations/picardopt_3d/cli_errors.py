"""How every command reads its arguments, reports user errors, and ends at Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def _nothing() -> str:
    return "nothing was written"


@contextlib.contextmanager
def cli_errors(command: str, stopped: Callable[[], str] = _nothing) -> Iterator[None]:
    """Prints user errors as one line and exits with 2; exits with 130 on Ctrl-C.

    Args:
        command: The command's name.
        stopped: Returns what to print after Ctrl-C.

    Raises:
        SystemExit: In place of a ValueError or an OSError, which are user errors, or a KeyboardInterrupt.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"picardopt {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped()}", file=sys.stderr)
        raise SystemExit(130) from None


def options_of(kind: type[T], command: str, argv: Sequence[str] | None, description: str) -> T:
    """Reads a command's options.

    Args:
        kind: Their dataclass.
        command: The command's name.
        argv: The arguments after it; None: those of the process.
        description: For `--help`.
    """
    return tyro.cli(
        kind,
        args=list(sys.argv[1:] if argv is None else argv),
        prog=f"picardopt {command}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
