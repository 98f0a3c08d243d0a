"""Checkpoint files: whole or refused, with one error, and never code."""

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from picardopt import CheckpointError, ParallelPicardOptimizer, load_checkpoint, save_checkpoint
from picardopt import checkpoint as module


def state_of(value=1.0):
    return {"weights": torch.full((40,), value), "step": 7, "nested": {"lr": [0.1, 0.2]}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, state_of())
    return path


def test_round_trip(saved):
    state = load_checkpoint(saved)
    assert torch.equal(state["weights"], torch.ones(40))
    assert state["step"] == 7
    assert state["nested"] == {"lr": [0.1, 0.2]}
    assert os.listdir(saved.parent) == ["run.ckpt"]


def test_the_file_may_be_read_by_whom_the_umask_lets(saved):
    before = os.umask(0o027)
    try:
        save_checkpoint(saved, state_of())
    finally:
        os.umask(before)
    assert saved.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_cut_short_anywhere_is_refused(saved, every):
    data = saved.read_bytes()
    for keep in (*range(0, len(data), every), len(data) - 1):
        saved.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=str(saved)):
            load_checkpoint(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="bytes"):
        load_checkpoint(saved)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_seen(saved, every):
    """In the header, in the archive's directory and in tensors, where torch.load sees nothing.

    Every ninth bit is one of nearly every byte, and each time another one.
    """
    data = saved.read_bytes()
    for position in range(0, len(data) * 8, every):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(saved)):
            load_checkpoint(saved)
    saved.write_bytes(data)
    load_checkpoint(saved)


def test_zeroed_data_is_seen(saved):
    data = bytearray(saved.read_bytes())
    data[-400:-200] = bytes(200)
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(saved)


def test_another_version_is_named(saved, monkeypatch):
    monkeypatch.setattr(module, "_VERSION", 2)
    with pytest.raises(CheckpointError, match="version 1, this picardopt reads 2"):
        load_checkpoint(saved)


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    marker, path = tmp_path / "marker", tmp_path / "run.ckpt"
    with pytest.raises(CheckpointError, match="other than tensors"):
        save_checkpoint(path, {"malice": Malice(marker)})
    assert not path.exists()
    # A file with a right checksum, made by somebody who means harm.
    monkeypatch.setattr(module, "_load_payload", lambda target, payload: {})
    save_checkpoint(path, {"malice": Malice(marker)})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="other than tensors"):
        load_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malice(marker)))  # the weapon was loaded
    assert marker.exists()


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_leaves_the_old_one(saved):
    for size in (0, 100, 1000):
        with files_no_longer_than(size), pytest.raises(CheckpointError, match="could not be"):
            save_checkpoint(saved, state_of(2.0))
    assert torch.equal(load_checkpoint(saved)["weights"], torch.ones(40))
    assert os.listdir(saved.parent) == ["run.ckpt"]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=64k none "$1" && cd "$1" && exec "$2" -c '
import os, sys, torch
from picardopt import CheckpointError, load_checkpoint, save_checkpoint
save_checkpoint("run.ckpt", {"x": torch.ones(10)})
try:
    save_checkpoint("run.ckpt", {"x": torch.ones(100_000)})
except CheckpointError as error:
    assert "No space left" in str(error), error
    assert torch.equal(load_checkpoint("run.ckpt")["x"], torch.ones(10))
    assert os.listdir(".") == ["run.ckpt"]
    sys.exit(42)
'
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("no file system of one's own may be mounted here")
    command = [*namespace, "sh", "-c", ON_A_SMALL_DISK, "sh", str(tmp_path), sys.executable]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 42, done.stderr


@contextmanager
def not_root() -> Iterator[None]:
    """Root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_named():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        save_checkpoint(path, state_of())
        os.chmod(folder, 0o555)
        with not_root(), pytest.raises(CheckpointError, match=r"denied.*can be written"):
            save_checkpoint(path, state_of(2.0))
        assert torch.equal(load_checkpoint(path)["weights"], torch.ones(40))
        assert os.listdir(folder) == ["run.ckpt"]
        os.chmod(folder, 0o755)


def test_an_error_of_the_disk_at_the_last_moment_leaves_the_old_file(saved, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "fsync", broken)
    with pytest.raises(CheckpointError, match="Input/output"):
        save_checkpoint(saved, state_of(2.0))
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(saved)["weights"], torch.ones(40))
    assert os.listdir(saved.parent) == ["run.ckpt"]


SAVES_FOREVER = """
import sys, torch
from picardopt import save_checkpoint
step = 0
while True:
    save_checkpoint(sys.argv[1], {"step": step, "x": torch.full((2_000_000,), float(step))})
    step += 1
"""


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """SIGKILL while it writes; what that leaves lying is removed by the next save."""
    path, leftovers = tmp_path / "run.ckpt", 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for attempt in range(20):  # the file may be whole before the signal arrives
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOREVER, str(path)], env=environment
        )
        deadline, before = time.monotonic() + 100, path.stat().st_mtime_ns if attempt else 0
        try:
            while (
                not path.exists()
                or path.stat().st_mtime_ns == before
                or len(os.listdir(tmp_path)) < 2
            ):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.002)  # the other one needs the processor
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        state = load_checkpoint(path)
        assert torch.equal(state["x"], torch.full((2_000_000,), float(state["step"])))
        leftovers += len(os.listdir(tmp_path)) - 1
        if leftovers and attempt >= 2:
            break
    assert leftovers
    (tmp_path / f".run.ckpt.elsewhere.{process.pid}.1.tmp").touch()  # another host's is its own
    save_checkpoint(path, state_of())
    assert sorted(os.listdir(tmp_path)) == [f".run.ckpt.elsewhere.{process.pid}.1.tmp", "run.ckpt"]


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="folder that exists"):
        save_checkpoint(tmp_path / "absent" / "run.ckpt", state_of())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "run.ckpt")


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state_of(), path)
    with pytest.raises(CheckpointError, match="not a picardopt checkpoint"):
        load_checkpoint(path)


def test_an_optimizer_and_its_model_come_back(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        base = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, ParallelPicardOptimizer(base, window=4, tolerance=0, seed=3)

    def closure_of(model):
        def closure(step):
            model.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            return loss

        return closure

    model, optimizer = make()
    closure = closure_of(model)
    for t in range(20):
        if t == 9:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(tmp_path / "run.ckpt", state)
        optimizer.step(closure)
    again, resumed = make()
    state = load_checkpoint(tmp_path / "run.ckpt")
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    closure = closure_of(again)
    for _ in range(20 - resumed.step_index):
        resumed.step(closure)
    assert torch.equal(model.weight, again.weight)
    assert resumed.step_index == 20
