"""What every command does with arguments, with what is wrong, and with Ctrl-C."""

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
def complaints(command: str, stopped: Callable[[], str] = _nothing) -> Iterator[None]:
    """Tell in one line what other arguments can mend, and leave with 2; with 130 at Ctrl-C.

    Args:
        command: its name.
        stopped: tells what is left after Ctrl-C.

    Raises:
        SystemExit: as said, in place of a ValueError, an OSError or a KeyboardInterrupt.
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
    """Read a command's options.

    Args:
        kind: their dataclass.
        command: the command's name.
        argv: the arguments after it; None: those of the process.
        description: for `--help`.
    """
    return tyro.cli(
        kind,
        args=list(sys.argv[1:] if argv is None else argv),
        prog=f"picardopt {command}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
