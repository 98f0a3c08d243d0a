"""What the trials of other people's code share: empty modules, processes of their own, comparison of bits."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from integrations.adapters.check import same_bits

Train = Callable[..., dict[str, Any]]
"""Makes a run in this process: a checkout, the number of steps, the seed, options of picardopt (None: without it)."""


def checkout(clone: Path, commit: str, paths: Sequence[str], folder: Path) -> None:
    """Puts files of a commit into a new folder."""
    folder.mkdir()
    packed = subprocess.run(
        ["git", "-C", clone, "archive", commit, "--", *paths], check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)


def load(name: str, path: Path) -> types.ModuleType:
    """Imports a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Empty(types.ModuleType):
    """Stands for a package that is not installed, and that is imported but never called: all that it has is None."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> None:
        """Returns None."""
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def missing(names: Sequence[str]) -> Iterator[None]:
    """Puts empty modules in the place of packages that are not installed, while others are imported in the block."""
    found = []
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent in found or (not parent and importlib.util.find_spec(name) is None):
            sys.modules[name] = Empty(name)
            found.append(name)
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    yield
    for name in found:
        del sys.modules[name]


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Names what is not the same in every bit."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{name}: other keys"]
        return [d for key in first for d in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list):
        if len(first) != len(second):
            return [f"{name}: other length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for index, (a, b) in pairs for d in differences(a, b, f"{name}.{index}")]
    return [] if same_bits(first, second) else [name]


def run(
    module: str, processes: int, folder: Path, steps: int, picard: str = "", seed: int = 0
) -> dict[str, Any]:
    """Makes a run in processes of its own; the module passes its arguments to `child`."""
    out = folder / "result.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", module]
    arguments = ["--child", str(folder), str(out), str(steps), str(seed), picard]
    subprocess.run([sys.executable, *command, *arguments], check=True)
    result: dict[str, Any] = torch.load(out, weights_only=False)
    return result


def child(train: Train, folder: str, out: str, steps: str, seed: str, picard: str) -> None:
    """Makes one run in this process; "NAME=VALUE ..." are options of picardopt, "" means without it."""
    options = {key: int(value) for key, value in (item.split("=") for item in picard.split())}
    result = train(Path(folder), int(steps), seed=int(seed), picard=options or None)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(result, out)


def report(name: str, steps: int, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Prints what became of a run: what it says of itself, its sweeps, and how it differs from the expected one."""
    parts = [str(found["says"])]
    if "strides" in found:
        parts.append(f"{len(found['strides'])} sweeps")
    if found is not expected:
        same = [key for key in expected if key != "says"]
        differ = differences({k: expected[k] for k in same}, {k: found[k] for k in same})
        parts.append(f"differs in {len(differ)} tensors" if differ else "every bit the same")
        pairs = [(found["parameters"][k], v) for k, v in expected["parameters"].items()]
        if differ and all(a.shape == b.shape for a, b in pairs):
            squared = sum(float((a - b).square().sum()) for a, b in pairs)
            parts.append(f"parameters {squared**0.5:.2f} away")
    print(f"{name}: {steps} steps, {', '.join(parts)}", flush=True)


def prove(
    module: str, description: str, checkouts: Callable[[Path, Path], tuple[Path, Path]]
) -> None:
    """Makes the runs of a trial, each in processes of its own, and prints how they compare.

    Args:
        module: Passes what follows `--child` to `child`.
        description: Of the command line.
        checkouts: Puts the code of a clone into an empty folder; returns where it is as it was, and with the adapter.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--window", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        original, changed = checkouts(options.clone, Path(scratch))
        sequential = run(module, 1, original, options.steps)
        report("sequential", options.steps, sequential, sequential)
        window = f"window={options.window}"
        for name, processes, picard in (
            ("tolerance 0", 1, f"{window} tolerance=0"),
            ("tolerance 0, two processes", 2, f"{window} tolerance=0"),
            ("default tolerance", 1, window),
        ):
            found = run(module, processes, changed, options.steps, picard)
            report(name, options.steps, found, sequential)
        found = run(module, 1, original, options.steps, seed=1)
        report("another seed", options.steps, found, sequential)
