"""Issues warnings that point at the user's own line."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from pathlib import Path
from types import FrameType

from picardopt.errors import PicardWarning

_PACKAGE = str(Path(__file__).parent)
_PATHS = sysconfig.get_paths()
_LIBRARIES = (_PACKAGE, _PATHS["stdlib"], _PATHS["purelib"], _PATHS["platlib"], "<frozen")


def warn_user(text: str) -> None:
    """Warns at the innermost line of the stack outside installed libraries."""
    frame: FrameType | None = sys._getframe(1)
    outside: FrameType | None = None  # the innermost frame outside picardopt
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARIES):
            break
        if outside is None and not name.startswith(_PACKAGE):
            outside = frame
        frame = frame.f_back
    frame = frame or outside or sys._getframe(1)
    warnings.warn_explicit(
        text,
        PicardWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
