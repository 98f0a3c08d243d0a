"""The `picardopt` command: runs the commands that installed packages register.

A package adds one through the entry-point group ``picardopt.commands``; each is a function of its
arguments, ``main(argv: list[str]) -> None``.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

GROUP = "picardopt.commands"


def main(argv: list[str] | None = None) -> int:
    """Runs ``picardopt COMMAND [ARGUMENT ...]``.

    Returns:
        The exit status: 0, or 2 for an unknown command.
    """
    arguments = sys.argv[1:] if argv is None else argv
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if arguments and arguments[0] in commands:
        commands[arguments[0]].load()(arguments[1:])
        return 0
    if arguments and arguments[0] == "--version":
        print(version("picardopt"))
        return 0
    known = "".join(f"  {name}\n" for name in sorted(commands)) or (
        '  none installed: `pip install "picardopt[3d]"` adds text-to-3D\n'
    )
    usage = f"usage: picardopt COMMAND [ARGUMENT ...]\n\ncommands (each takes --help):\n{known}"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage, end="")
        return 0
    print(f"picardopt: no command {arguments[0]!r}\n\n{usage}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
