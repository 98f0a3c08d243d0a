"""Pages that tests open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.helpers.browser import Opened


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
