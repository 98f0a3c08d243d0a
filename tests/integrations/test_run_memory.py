"""What a window takes is said before the first step, and refused where the device has less."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from picardopt_3d.run import memory as run_memory
from picardopt_3d.run.memory import memory_of
from picardopt_3d.run.worker import train

from picardopt import WindowMemoryError
from tests.integrations.helpers.tiny_runs import options


def test_what_a_window_takes_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing of a sequential run, which has none."""
    train(options(tmp_path / "a", window=3, tolerance=0.0), time.time())
    said = capfd.readouterr().err
    assert re.search(r"a window of 3 takes [\d.]+ [kM]B of memory besides the run's own", said)
    train(options(tmp_path / "b", sequential=True), time.time())
    assert "of memory" not in capfd.readouterr().err


def test_more_than_the_device_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2**30 < memory_of(torch.device("cpu")) < 2**50
    monkeypatch.setattr(run_memory, "memory_of", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"window=4 takes .* cpu has 10 kB: --window 2 takes"):
        train(options(tmp_path, window=4, tolerance=0.0), time.time())
    assert not list(tmp_path.glob("*.pt"))


def test_where_memory_ends_the_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the window, not the recipe's."""
    zeros, rows = torch.zeros, 0

    def allocate(*shape: int, **given: object) -> torch.Tensor:
        nonlocal rows
        if given.get("dtype") is torch.uint8:
            rows += 1
            if rows > 6:
                return zeros(1 << 60, dtype=torch.uint8)
        return zeros(*shape, **given)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros", allocate)
    with pytest.raises(WindowMemoryError, match="a window of 4 takes") as caught:
        train(options(tmp_path, window=4, tolerance=0.0), time.time())
    assert not any("recipe.batch" in note for note in getattr(caught.value, "__notes__", ()))
