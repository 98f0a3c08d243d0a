"""Two hosts on one machine: each is a set of namespaces with a name, an address and processes of its own.

They share files, as the hosts of a cluster often do. A veth pair joins them, or a wire that can fail.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import wire as wire_script

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.71.0.1", "10.71.0.2")
TABLE = f"127.0.0.1 localhost\n{ADDRESSES[0]} {NAMES[0]}\n{ADDRESSES[1]} {NAMES[1]}\n"
"""/etc/hosts of both, where a test has no other one."""
_SPACES = ("--net", "--uts", "--mount", "--pid")
_BEGIN = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo up && exec cat'

Process = subprocess.Popen[str]


class NoHostsError(RuntimeError):
    """This machine lets us make no namespaces, or no wire."""


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        pid: A process that lives there; all others of the host end with it.
        enter: What precedes a command that runs there.
        started: What was started there.
    """

    pid: str
    enter: tuple[str, ...]
    started: list[Process]

    def start(self, command: Sequence[str], folder: Path | str = ".", **options: Any) -> Process:
        """Starts a command there, in a folder."""
        there = ["sh", "-c", 'cd "$0" && exec "$@"', str(Path(folder).absolute())]
        process = subprocess.Popen([*self.enter, *there, *command], text=True, **options)
        self.started.append(process)
        return process


class Wire:
    """The process of `tests.helpers.wire`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __call__(self, line: str) -> str:
        """Changes the wire ("delay 0.05", "loss 0.1", "cut", "heal") or asks it ("dropped"); returns its answer."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return _answer(self._process)


@contextmanager
def two_hosts(
    folder: Path, tables: Sequence[str] = (TABLE, TABLE), relayed: bool = True
) -> Iterator[tuple[list[Host], Wire | None]]:
    """Makes two hosts; nothing is left of them afterwards.

    Args:
        folder: For their /etc/hosts.
        tables: Contents of those.
        relayed: Whether they are joined by a wire that can fail, or else by a veth pair.

    Raises:
        NoHostsError: If that cannot be done here; the message says why.
    """
    with ExitStack() as stack:
        user: tuple[str, ...] = ()  # of a user namespace in which we are root
        inside: tuple[str, ...] = ()
        if os.geteuid() != 0:
            holder = _living(
                stack, ["unshare", "--user", "--map-root-user", "sh", "-c", "echo up; exec cat"]
            )
            user = ("--user", "--preserve-credentials")
            inside = ("nsenter", f"--target={holder.pid}", *user)
        hosts: list[Host] = []
        stack.callback(_end, hosts)
        for name, table in zip(NAMES, tables, strict=True):
            file = folder / f"hosts of {name}"
            file.write_text(table)
            begin = ["sh", "-c", _BEGIN, name, str(file)]
            made = _living(
                stack,
                [*inside, "unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", *begin],
            )
            # The process inside is the only child of the one that made the namespaces.
            pid = Path(f"/proc/{made.pid}/task/{made.pid}/children").read_text().strip()
            hosts.append(Host(pid, ("nsenter", f"--target={pid}", *user, *_SPACES), []))
        (a, b), wire = hosts, None
        if relayed:
            script = [sys.executable, wire_script.__file__]
            ends = [a.pid, ADDRESSES[0], b.pid, ADDRESSES[1]]
            wire = Wire(_living(stack, [*inside, *script, *ends]))
        else:
            words = f"link add wire type veth peer name wire netns {b.pid}"
            _run(["nsenter", f"--target={a.pid}", *user, "--net", "ip", *words.split()])
            for host, address in zip(hosts, ADDRESSES, strict=True):
                for words in (f"address add {address}/24 dev wire", "link set wire up"):
                    _run([*host.enter, "ip", *words.split()])
        yield hosts, wire


def _living(stack: ExitStack, command: list[str]) -> Process:
    """Starts a process that says "up", and lives until the stack closes: its standard input ends then."""
    if shutil.which(command[0]) is None or shutil.which("ip") is None:
        raise NoHostsError(f"{command[0]} and ip are needed")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    stack.enter_context(process)  # waits, after the next line's callback
    if _answer(process) != "up":
        _, told = process.communicate()
        raise NoHostsError(f"{' '.join(command[:4])} ...: {told.strip().splitlines()[-1]}")
    assert process.stdin is not None
    stack.callback(process.stdin.close)
    return process


def _end(hosts: Sequence[Host]) -> None:
    """Waits for what was started on hosts that are gone."""
    for process in (process for host in hosts for process in host.started):
        for file in (process.stdin, process.stdout, process.stderr):
            if file is not None:
                with suppress(OSError):
                    file.close()
        process.wait()


def _answer(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoHostsError(f"{' '.join(command)}: {done.stderr.strip()}")
