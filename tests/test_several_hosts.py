"""Two hosts under torchrun, with the commands of docs/several-hosts.md; their link is slow, lossy or cut in mid-sweep.

The hosts are namespaces of this machine (`tests.helpers.hosts`): they need root, or user namespaces.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import picardopt
from picardopt.optimizer import STATE_KEY
from tests.helpers.hosts import NAMES, TABLE, Host, NoHostsError, Process, Wire, two_hosts
from tests.helpers.meshes import STEPS, Run, plain_run
from tests.helpers.pool import ROOT
from tests.helpers.runs import SECONDS, assert_same_bits
from tests.test_launch import environment

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "several-hosts.md").read_text()
COMMAND = re.compile(r"^(torchrun .*?train\.py) +# (\w+), on (host-a|host-b|both)$", re.MULTILINE)
RUN = Run((2, 2), window=4, norm=True)
PATIENCE = 200.0
"""Seconds for what takes ten where nobody else computes."""
TIMEOUT = 4.0
"""Seconds that a rank waits for another one where the link is cut."""

SCRIPT = """
import datetime, os, signal, socket, sys, time
from pathlib import Path

import torch
import picardopt
from picardopt.optimizer import STATE_KEY
from tests.helpers.meshes import STEPS, Run, build, make_closure, record
from tests.helpers.runs import Trace, stats_of

torch.set_num_threads(1)
folder, timeout, fault = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
picardopt.init_process_group(timeout=datetime.timedelta(seconds=60))
rank = torch.distributed.get_rank()
shape = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
model, _, optimizer = build(Run(shape, window=4, norm=True, timeout=timeout))
checkpoint, go_on = folder / "checkpoint.pt", folder / "go on"
if checkpoint.exists():
    state = picardopt.load_checkpoint(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
start, healthy, trace = optimizer.step_index, make_closure(model, optimizer), Trace()

def closure(step):
    if start == 0 and step >= 5 and rank == {"link": 0, "kill": 3}.get(fault):
        if fault == "kill":
            go_on.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "in a sweep").touch()
        while not go_on.exists():
            time.sleep(0.01)
    return healthy(step)

try:
    for step in range(start, STEPS):
        record(trace, optimizer.step(closure), model, optimizer)
        if rank == 0 and step % 2 == 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            picardopt.save_checkpoint(checkpoint, state)
except picardopt.RankLostError as error:
    after = time.time() - go_on.stat().st_mtime
    torch.save((str(error), after, socket.gethostname()), folder / f"lost {rank}")
    raise
after = time.time() - go_on.stat().st_mtime if go_on.exists() else 0
place = socket.gethostname(), optimizer._grid.picard.rank, optimizer.data_rank
torch.save((start, trace.parts(), stats_of(optimizer), place, after), folder / f"rank {rank}")
torch.distributed.destroy_process_group()
"""


@contextmanager
def hosts_or_skip(folder: Path, **options: Any) -> Iterator[tuple[list[Host], Wire]]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts(folder, **options))
        except NoHostsError as error:
            pytest.skip(f"no two hosts here: {error}")
        yield found


def commands(way: str) -> list[list[str]]:
    """What the page says to run on each host."""
    found = {where: line for line, kind, where in COMMAND.findall(PAGE) if kind == way}
    lines = [found.get(name) or found["both"] for name in NAMES]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [[*torchrun, *shlex.split(line)[1:]] for line in lines]


class Job:
    """One script under torchrun on both hosts."""

    def __init__(
        self, hosts: list[Host], way: str, folder: Path, *args: object, **more: str
    ) -> None:
        self.logs = [folder / f"log of {name}" for name in NAMES]
        self.processes: list[Process] = []
        for host, command, log in zip(hosts, commands(way), self.logs, strict=True):
            with log.open("w") as file:
                self.processes.append(
                    host.start(
                        [*command, *map(str, args)],
                        folder,
                        env=environment() | more,
                        stdout=file,
                        stderr=file,
                    )
                )

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while not done():
            ended = [process.poll() for process in self.processes]
            assert not any(ended), f"{ended}\n{self}"
            assert time.monotonic() < limit, f"not within {seconds} s\n{self}"
            time.sleep(0.02)

    def codes(self, seconds: float) -> list[int]:
        """What the launchers return."""
        limit = time.monotonic() + seconds
        try:
            return [process.wait(limit - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not within {seconds} s\n{self}")

    def __str__(self) -> str:
        return "\n".join(log.read_text()[-6000:] for log in self.logs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def check(folder: Path) -> tuple[int, float]:
    """All ranks have the bits of the sequential run; returns where they began, and seconds since the fault."""
    expected, starts, seconds = plain_run(RUN), set(), []
    for rank in range(RUN.ranks):
        start, parts, stats, place, after = torch.load(folder / f"rank {rank}", weights_only=False)
        assert place == (NAMES[rank // 2], rank // 2, rank % 2)  # a data row lies within a host
        for name, values in expected.parts().items():
            assert_same_bits(parts[name], values[start:], f"rank {rank}, {name}")
        assert max(stats["strides"]) > 1, stats["strides"]
        starts.add(start)
        seconds.append(after)
    (start,) = starts
    return start, min(seconds)


ECHO = """
import socket
with socket.create_server(("", 5000)) as server:
    print("listens", flush=True)
    connection, _ = server.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
"""
ASK = """
import socket, sys, time
with socket.create_connection(("host-b", 5000), timeout=10) as connection:
    connection.settimeout(4)
    for line in sys.stdin:
        began, size = time.monotonic(), int(line)
        connection.sendall(bytes(size))
        try:
            while size:
                size -= len(connection.recv(65536))
            print(time.monotonic() - began, flush=True)
        except TimeoutError:
            print("lost", flush=True)
"""


def test_the_wire_does_what_it_is_told(folder: Path) -> None:
    with hosts_or_skip(folder) as (hosts, wire):
        pipe = subprocess.PIPE
        echo = hosts[1].start([sys.executable, "-c", ECHO], stdout=pipe)
        assert echo.stdout.readline() == "listens\n"
        ask = hosts[0].start([sys.executable, "-c", ASK], stdin=pipe, stdout=pipe)

        def asked(size: int) -> str:
            print(size, file=ask.stdin, flush=True)
            return ask.stdout.readline().strip()

        assert asked(100_000) != "lost"
        wire("delay 0.05")
        assert float(asked(1)) > 0.1
        wire("delay 0")
        assert wire("dropped") == "0"
        wire("loss 0.5")
        answers = [asked(1) for _ in range(4)]
        assert any(answer != "lost" for answer in answers)
        assert int(wire("dropped")) > 0
        wire("cut")
        assert asked(1) == "lost"


@pytest.mark.parametrize("way", ["static", "c10d"])
def test_exact(folder: Path, way: str) -> None:
    with hosts_or_skip(folder, relayed=False) as (hosts, _):
        job = Job(hosts, way, folder, folder, 60.0, "none")
        assert job.codes(PATIENCE) == [0, 0], str(job)
    assert check(folder)[0] == 0


@pytest.mark.parametrize("fault", ["delay 0.05", "loss 0.2"])
def test_a_slow_or_lossy_link(folder: Path, fault: str) -> None:
    """From the middle of a sweep on: late, but right."""
    with hosts_or_skip(folder) as (hosts, wire):
        job = Job(hosts, "c10d", folder, folder, 60.0, "link")
        job.wait_for((folder / "in a sweep").exists, PATIENCE)
        wire(fault)
        (folder / "go on").touch()
        assert job.codes(PATIENCE) == [0, 0], str(job)
        dropped = int(wire("dropped"))
    start, seconds = check(folder)
    assert start == 0
    assert seconds > 0.1
    assert (dropped > 0) is fault.startswith("loss")


@pytest.mark.parametrize("way", ["static", "c10d"])
def test_a_link_that_is_cut(folder: Path, way: str) -> None:
    """An error on every rank of both hosts; once it is whole again, torchrun's restart goes on from the checkpoint."""
    with hosts_or_skip(folder) as (hosts, wire):
        job = Job(hosts, way, folder, folder, TIMEOUT, "link")
        job.wait_for((folder / "in a sweep").exists, PATIENCE)
        wire("cut")
        (folder / "go on").touch()
        lost = [folder / f"lost {rank}" for rank in range(RUN.ranks)]
        job.wait_for(lambda: all(file.exists() for file in lost), TIMEOUT + SECONDS)
        wire("heal")
        assert job.codes(PATIENCE) == [0, 0], str(job)
        assert "terminate called" not in str(
            job
        )  # every process ended with its error, none by an abort
    for rank, file in enumerate(lost):
        message, seconds, host = torch.load(file)
        assert "rank" in message
        assert seconds < TIMEOUT + SECONDS, f"rank {rank} on {host}"
    assert 0 < check(folder)[0] < STEPS


@pytest.mark.parametrize("way", ["static", "c10d"])
def test_a_rank_that_is_killed(folder: Path, way: str) -> None:
    """On the second host: all others hear of it at once, and the restart goes on from the checkpoint."""
    with hosts_or_skip(folder, relayed=False) as (hosts, _):
        job = Job(hosts, way, folder, folder, 60.0, "kill")
        assert job.codes(PATIENCE) == [0, 0], str(job)
    for rank in range(3):
        _, seconds, _ = torch.load(folder / f"lost {rank}")
        assert seconds < SECONDS
    assert 0 < check(folder)[0] < STEPS


def test_names_that_mean_the_host_alone(folder: Path) -> None:
    """As in /etc/hosts of Debian: the error names the hosts and the remedy, and the remedy helps."""
    tables = [f"127.0.1.1 {name}\n{TABLE}" for name in NAMES]
    with hosts_or_skip(folder, relayed=False, tables=tables) as (hosts, _):
        job = Job(hosts, "static", folder, folder, 60.0, "none")
        assert 0 not in job.codes(PATIENCE), str(job)
        for log in job.logs:
            assert "gloo would look for host-a at 127.0.1.1 (it has the interf" in log.read_text()
            assert "GLOO_SOCKET_IFNAME" in log.read_text()
        job = Job(hosts, "static", folder, folder, 60.0, "none", GLOO_SOCKET_IFNAME="wire")
        assert job.codes(PATIENCE) == [0, 0], str(job)
    check(folder)


def test_the_script_of_the_page(folder: Path) -> None:
    """It leaves a checkpoint of its last step."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / "train.py").write_text(block)
    with hosts_or_skip(folder, relayed=False) as (hosts, _):
        job = Job(hosts, "c10d", folder)
        assert job.codes(PATIENCE) == [0, 0], str(job)
    state = picardopt.load_checkpoint(folder / "run.pt")
    assert state["optimizer"][STATE_KEY]["step"] == 200


def test_the_benchmark_of_a_slow_link(folder: Path) -> None:
    with hosts_or_skip(folder):
        pass
    tiny = ["--delays", "1", "--parameters", "100", "--windows", "4", "--steps", "16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "slow_link.py"), *tiny],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| 1 \| 100 \|", done.stdout, flags=re.MULTILINE)) == 3
