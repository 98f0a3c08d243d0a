"""A run in a real browser, through the command line: what a person sees, and does."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from picardopt_3d.viewer.server import LOOPBACK
from PIL import Image

from tests.integrations.helpers.viewers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 240_000
"""Milliseconds to wait for anything."""


TEXT_TO_3D, VIEW = "picardopt_3d.command:text_to_3d", "picardopt_3d.viewer.command:main"
"""The functions of two commands."""


@contextlib.contextmanager
def command(function: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of `picardopt` while the block runs; its name may not be installed yet."""
    module, _, name = function.partition(":")
    code = f"from {module} import {name}; {name}()"
    line = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


class Visitor:
    """A page that is open.

    Args:
        browser: Playwright's.
        port: Where the viewer listens.

    Attributes:
        troubles: Console errors, and errors that nobody caught.
        hosts: Machines that the page asked for something; None: itself, for data that it holds.
    """

    def __init__(self, browser: Any, port: int) -> None:
        self.troubles: list[str] = []
        self.hosts: set[str | None] = set()
        self.page = browser.new_page(viewport={"width": 900, "height": 600})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.goto(f"http://{LOOPBACK}:{port}")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.troubles.append(message.text)

    def sees(self, text: str) -> None:
        """Waits for a text."""
        self.page.get_by_text(text).first.wait_for()

    def press(self, name: str) -> None:
        """Presses a button."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def turn(self) -> None:
        """Drags the scene by the mouse."""
        self.page.mouse.move(150, 450)
        self.page.mouse.down()
        for step in range(5):
            self.page.mouse.move(190 + 40 * step, 450)
        self.page.mouse.up()

    def scene(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The part of the window where only the scene is, once it stays the same for a second."""
        before = self._shot()
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            time.sleep(1.0)
            now = self._shot()
            if np.array_equal(before, now):
                return now
            assert time.monotonic() < deadline
            before = now

    def _shot(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        content = self.page.screenshot(clip={"x": 0, "y": 200, "width": 560, "height": 400})
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32) / 255


def wait_until_served(port: int, process: subprocess.Popen[str]) -> None:
    """Waits for the line that names the address."""
    assert process.stderr is not None
    for line in process.stderr:
        if f"http://{LOOPBACK}:{port}" in line:
            return
    pytest.fail("it ended without an address")


def read_on(process: subprocess.Popen[str]) -> None:
    """Reads what a process prints, so that it never waits for a reader."""
    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()


def test_a_run_is_watched_turned_paused_and_viewed_afterwards(browser: Any, tmp_path: Path) -> None:
    out, port = tmp_path / "cube", free_port()
    recipe = ["--recipe.steps", "40", "--recipe.pixels", "16", "--recipe.guidance.model", "exact"]
    run = ["a red cube", "--out", str(out), "--workers", "2", "--window", "4"]
    served = ["--viewer-port", str(port)]
    with command(TEXT_TO_3D, *run, *recipe, "--viewer", *served) as process:
        wait_until_served(port, process)
        read_on(process)
        visitor = Visitor(browser, port)
        visitor.sees("a red cube")
        visitor.press("Pause")
        visitor.sees("paused after step")
        before = visitor.scene()
        assert float(before.std()) > 0.01  # not blank
        visitor.turn()
        assert float(np.abs(visitor.scene() - before).mean()) > 0.002
        visitor.press("Save a checkpoint")
        visitor.sees("Checkpoint saved")
        assert (out / "stages/1-stage/checkpoint.pt").is_file()
        assert not (out / "report.json").exists()
        assert visitor.page.get_by_text("steps made final by sweep").count() == 1
        visitor.press("Continue")
        assert process.wait(PATIENCE / 1000) == 0
        visitor.page.close()
    assert (out / "report.json").is_file()
    with command(VIEW, str(out), *served) as process:
        wait_until_served(port, process)
        after = Visitor(browser, port)
        after.sees("finished, 1-stage")
        assert float(after.scene().std()) > 0.01
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        after.page.close()
    # The browser says that its connections end with the viewers.
    lost = [text for text in visitor.troubles + after.troubles if "WebSocket" not in text]
    assert lost == []
    assert visitor.hosts | after.hosts == {LOOPBACK, None}
