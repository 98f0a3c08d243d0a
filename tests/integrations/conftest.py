"""Films of a few frames, where it does not matter how long they are: of some scenes a whole one takes ten seconds."""

import pytest
from picardopt_3d.run import outputs

WHOLE = outputs.FILM_FRAMES


@pytest.fixture(autouse=True)
def short_film(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "FILM_FRAMES", 4)


@pytest.fixture
def whole_film(short_film: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at the film."""
    monkeypatch.setattr(outputs, "FILM_FRAMES", WHOLE)
