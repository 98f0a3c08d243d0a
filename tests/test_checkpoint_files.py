"""Checkpoint files: whole or refused, with one error, and never code."""

import errno
import os
import pickle
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


@pytest.mark.parametrize("keep", [0, 10, 40, 200, -1])
def test_a_truncated_file_is_refused(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=str(saved)):
        load_checkpoint(saved)


def test_a_flipped_bit_is_seen(saved):
    data = saved.read_bytes()
    at = data.rindex(torch.ones(40).numpy().tobytes())
    for offset in (0, 1, 79, 159):
        damaged = bytearray(data)
        damaged[at + offset] ^= 1
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
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


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(saved, state_of(2.0))
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(saved)["weights"], torch.ones(40))
    assert os.listdir(saved.parent) == ["run.ckpt"]


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
