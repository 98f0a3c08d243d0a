"""One line of the report."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "absent", "broken"]


class Finding(NamedTuple):
    """What was found of one package, device or model.

    Attributes:
        state: "absent" is no fault, "broken" is one.
        name: Of the package, device or model.
        detail: Version, memory or size; or what is wrong, and the remedy.
    """

    state: State
    name: str
    detail: str


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
