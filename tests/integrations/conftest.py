"""One headless Chromium for all tests that need a browser, which skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, drawing WebGL on the CPU."""
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
