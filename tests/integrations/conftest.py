"""Short films, and a headless Chromium; tests that need one skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from picardopt_3d.run import outputs

_WHOLE = outputs.FILM_FRAMES
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(autouse=True)
def short_film(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some scenes a whole one takes ten seconds."""
    monkeypatch.setattr(outputs, "FILM_FRAMES", 4)


@pytest.fixture
def whole_film(short_film: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at the film."""
    monkeypatch.setattr(outputs, "FILM_FRAMES", _WHOLE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, drawing WebGL on the CPU; while it is there, this thread can have no other loop of asyncio."""
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    with library.sync_playwright() as driver:
        # Chromium's own sandbox cannot be used by root, as whom containers run.
        opened = driver.chromium.launch(
            executable_path=found, args=_FLAGS, chromium_sandbox=False, timeout=60_000
        )
        yield opened
        opened.close()
