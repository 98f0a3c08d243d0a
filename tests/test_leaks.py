"""What every test is checked for afterwards is found: a planted thread, process or setting."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import leaks


def left_by(act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(leaks, "PATIENCE", 0.3)
    with pytest.raises(AssertionError) as caught, leaks.nothing_is_left():
        act()
    return str(caught.value)


def test_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="planted")
    try:
        assert "left running: ['thread planted']" in left_by(thread.start, monkeypatch)
    finally:
        end.set()
        thread.join()


def test_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    found = left_by(lambda: started.append(subprocess.Popen(["sleep", "100"])), monkeypatch)
    started[0].kill()
    started[0].wait()
    assert found.startswith(f"left running: ['process {started[0].pid}: sleep 100']")


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before, handler = os.getcwd(), signal.getsignal(signal.SIGTERM)
    try:
        assert "'threads': (1, 2)" in left_by(lambda: torch.set_num_threads(2), monkeypatch)
        assert "'$RANK'" in left_by(lambda: os.environ.update(RANK="1"), monkeypatch)
        assert "'folder'" in left_by(lambda: os.chdir("/"), monkeypatch)
        ignore = signal.SIG_IGN
        assert "'handlers'" in left_by(lambda: signal.signal(signal.SIGTERM, ignore), monkeypatch)
    finally:
        torch.set_num_threads(1)
        os.environ.pop("RANK", None)
        os.chdir(before)
        signal.signal(signal.SIGTERM, handler)


def test_what_ends_by_itself_is_waited_for() -> None:
    with leaks.nothing_is_left():
        threading.Timer(0.1, int).start()
        subprocess.run(["true"], check=True)
