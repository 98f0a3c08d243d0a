"""A page in a headless browser, as a person uses it, with a list of what went wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PLAIN = """.stage { position: fixed; top: 0; left: 0; z-index: 9; background: #fff !important; }
.stage, canvas { width: 128px !important; height: 128px !important; border-radius: 0 !important; }"""
"""Makes the object's canvas a white square of 128 pixels."""


class Opened:
    """A page that is open.

    Args:
        browser: Playwright's.
        path: The file.
        options: Of the browser's context: size of the window, colours, ...

    Attributes:
        page: Playwright's page.
        troubles: Console errors, and errors that nobody caught.
        requests: Addresses that the page asked for, apart from its own file and data within it.
    """

    def __init__(self, browser: Any, path: Path, options: dict[str, Any]) -> None:
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(offline=True, **options)
        self._context.set_default_timeout(20_000)
        self._own = path.absolute().as_uri()
        self._context.route("**/*", self._refuse)
        self.page = self._context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.goto(self._own)

    def _refuse(self, route: Any) -> None:
        """Lets the page's own file through, and nothing else."""
        if route.request.url == self._own:
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and "GPU stall" not in message.text:
            self.troubles.append(message.text)

    def close(self) -> None:
        """Closes the page."""
        self._context.close()

    def drawn(self, after: int = 0) -> int:
        """Waits until the object has been drawn more often than this; returns how often."""
        self.page.wait_for_function(
            "after => Number(document.querySelector('canvas').dataset.drawn ?? 0) > after",
            arg=after,
        )
        return int(self.page.evaluate("Number(document.querySelector('canvas').dataset.drawn)"))

    def settled(self) -> None:
        """Waits for two frames, after which all that was asked for is drawn."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def picture(self, selector: str = "canvas") -> NDArray[np.float32]:
        """What an element looks like, RGB in [0, 1], `[height, width, 3]`."""
        self.settled()
        shot = self.page.locator(selector).first.screenshot()
        pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), np.float32)
        return pixels / np.float32(255)
