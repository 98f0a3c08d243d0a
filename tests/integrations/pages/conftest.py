"""One headless Chromium for all tests of pages, which skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.helpers.browser import Opened

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="package")
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


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file in a context of its own, offline; at the end nothing has gone wrong in it."""
    opened: list[Opened] = []

    def open_(path: Path, **options: Any) -> Opened:
        opened.append(Opened(browser, path, options))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()
    for each in opened:
        assert each.troubles == []
        assert each.requests == []
