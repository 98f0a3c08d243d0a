"""What is kept of a run, and how a later run is compared with it."""

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.runs import as_bytes

PATH = Path(__file__).with_name("results.json")
ROUNDING = 2e-2
"""Largest relative difference of norms and losses where the machine or torch is another one."""
STEPS_PER_SWEEP = 0.34
"""Largest relative difference of steps per sweep there: one decision near its threshold goes the other way."""


def fingerprint() -> dict[str, str]:
    """What the bits of a run depend on beside the code."""
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "architecture": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def digest(value: Any) -> str:
    """SHA-256 of nested tensors and plain values; the order of dictionaries' keys does not count."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield as_bytes(value).numpy().tobytes()
    elif isinstance(value, dict):
        yield f"dict {len(value)}".encode()
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for entry in value:
            yield from _parts(entry)
    else:
        yield repr(value).encode()


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all numbers together."""
    return math.sqrt(
        sum(float(tensor.detach().double().abs().square().sum()) for tensor in tensors)
    )


def result(
    *,
    parameters: Sequence[Tensor],
    state: Any,
    losses: Sequence[float],
    carry: Sequence[Tensor] = (),
    measures: Any = None,
    strides: Sequence[int],
    evaluations: int,
    wasted: int,
) -> dict[str, Any]:
    """Digests, counts and rough values of one run, as `results.json` holds them.

    Args:
        parameters: As the run left them.
        state: Of its optimizers, nested.
        losses: One a step.
        carry: What else it rewrites.
        measures: Residuals and thresholds of every sweep, where they are known.
        strides: One a sweep.
        evaluations: Drifts evaluated.
        wasted: Of these, those that never became a step.
    """
    return {
        "sha256": {
            "parameters": digest(list(parameters)),
            "state": digest(state),
            "carry": digest(list(carry)),
            "losses": digest([float(loss) for loss in losses]),
            "measures": digest(measures),
        },
        "steps": len(losses),
        "sweeps": len(strides),
        "strides": list(strides),
        "evaluations": evaluations,
        "wasted": wasted,
        "norm": norm(parameters),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def load() -> dict[str, Any]:
    """The recorded results."""
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def is_here(recorded: dict[str, Any]) -> bool:
    """Whether results were recorded on a machine and a torch like these."""
    return bool(recorded["fingerprint"] == fingerprint())


def assert_same(got: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Every bit and every count."""
    wrong = [
        f"{name}: {got[name]!r}, recorded {expected!r}"
        for name, expected in recorded.items()
        if got[name] != expected
    ]
    assert not wrong, "\n".join(wrong)


def assert_near(got: dict[str, Any], recorded: dict[str, Any]) -> None:
    """What holds on any machine: steps, norms to rounding, steps per sweep roughly."""
    assert got["steps"] == recorded["steps"]
    for name in ("norm", "first_loss", "last_loss"):
        assert math.isclose(got[name], recorded[name], rel_tol=ROUNDING), (
            f"{name}: {got[name]}, recorded {recorded[name]}"
        )
    pace, expected = got["steps"] / got["sweeps"], recorded["steps"] / recorded["sweeps"]
    assert math.isclose(pace, expected, rel_tol=STEPS_PER_SWEEP), (
        f"strides: {got['strides']}, recorded {recorded['strides']}"
    )
