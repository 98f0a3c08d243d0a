"""Loops that are not the user's own: which calls of ``step`` cannot run ahead, and where the user's line is.

Running ahead needs a closure that can be evaluated for any step, at any time. A framework that has run backward
already, or whose closure wants to be executed in the very call, gets plain steps of the base, and is told once.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from picardopt.errors import ImpureClosureError, PicardWarning

_OURS = str(Path(__file__).parent)
_PATHS = sysconfig.get_paths()
_LIBRARIES = (_OURS, _PATHS["stdlib"], _PATHS["purelib"], _PATHS["platlib"], "<frozen")
_NO_CLOSURE = (
    "step() without a closure takes a plain step of the base optimizer: nothing runs ahead. Pass a closure that "
    "computes a step's loss and its gradients from that step's own batch: `def closure(step): batch = "
    "StepIndexedLoader(loader).batch(step); ...`"
)
_AUTOMATIC = (
    "Lightning's automatic optimization hands over one batch a call and executes its closure in that call, so "
    "plain steps of the base are taken: nothing runs ahead. Set self.automatic_optimization = False and call "
    "`self.optimizers().step(closure)` with a closure that takes its batch by step: `def closure(step): batch = "
    "StepIndexedLoader(loader).batch(step); ...`"
)


def why_plain(closure: Callable[..., Any] | None) -> str:
    """Why a call of ``step`` cannot run ahead, with the remedy; empty if it can.

    Args:
        closure: What ``step`` was given.

    Raises:
        TypeError: If it is not callable.
    """
    if closure is None:
        return _NO_CLOSURE
    if not callable(closure):
        raise TypeError(
            f"closure={closure!r}: give a function that computes a loss and its gradients"
        )
    if not wrapped_by_lightning(closure):
        return ""
    model, _, own = closure.args  # type: ignore[attr-defined]
    if model.automatic_optimization:
        return _AUTOMATIC
    return _NO_CLOSURE if getattr(own, "__name__", "") == "do_nothing_closure" else ""


def wrapped_by_lightning(closure: Callable[..., Any]) -> bool:
    """Whether this is a closure as Lightning's precision plugins pass it on.

    It is ``partial(plugin._wrap_closure, model, optimizer, own)``, where `own` is the closure of
    automatic optimization, the user's of manual optimization, or one that does nothing.
    """
    if not isinstance(closure, functools.partial) or len(closure.args) != 3:
        return False
    package = getattr(closure.func, "__module__", "").split(".")[0]
    name = getattr(closure.func, "__name__", "")
    return name == "_wrap_closure" and package in ("lightning", "pytorch_lightning")


def refuse_unscaling(caller: FrameType) -> None:
    """Raises if a GradScaler is about to unscale inside a closure that is evaluated ahead of time.

    A scaler unscales once between two ``update()``: later evaluations would fail, and the scalers of several ranks
    would each have seen another step's gradient.

    Args:
        caller: The frame that asks for the wrapper's groups.

    Raises:
        ImpureClosureError: With what to do instead.
    """
    if caller.f_globals.get("__name__") != "torch.amp.grad_scaler":
        return
    frame = caller.f_back
    while frame is not None and frame.f_code.co_name != "evaluate_drift":
        frame = frame.f_back
    if frame is not None:
        raise ImpureClosureError(
            "the closure called GradScaler.unscale_: a scaler takes one gradient a step, but a closure is evaluated "
            "for several steps ahead. Use bfloat16 autocast, which needs no scaler; or multiply the loss by a constant "
            'in the closure, divide the gradients by it after backward(), and pass nonfinite="skip"; or keep the '
            "scaler, run backward() in your loop and call scaler.step(optimizer): nothing runs ahead then"
        )


def warn_user(text: str) -> None:
    """Warns at the user's own line: the innermost one that is in no installed library."""
    frame: FrameType | None = sys._getframe(1)
    outside: FrameType | None = None  # of picardopt
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARIES):
            break
        if outside is None and not name.startswith(_OURS):
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
