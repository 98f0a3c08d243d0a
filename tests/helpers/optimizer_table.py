"""Runs published optimizers alone and through the wrapper, and writes docs/optimizers.md.

python -m tests.helpers.optimizer_table        # some minutes
"""

import contextlib
import inspect
import io
import random
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from picardopt import ParallelPicardOptimizer, UnsupportedOptimizerError, step_rng
from tests.helpers.problems import Problem
from tests.helpers.runs import assert_same_bits, make_closure
from tests.helpers.third_party import PACKAGES, Entry, entries, surroundings

TABLE = Path(__file__).parents[2] / "docs" / "optimizers.md"
STEPS, WINDOW = 10, 4
LONG = 16  # steps of the runs at the default tolerance


@dataclass
class Run:
    """What a run left behind, for a comparison of bits."""

    losses: list[Tensor] = field(default_factory=list)
    parameters: list[list[Tensor]] = field(default_factory=list)
    held: Any = None
    strides: list[int] = field(default_factory=list)

    def record(self, loss: Tensor, problem: Problem) -> None:
        self.losses.append(loss.detach().clone())
        self.parameters.append([p.detach().clone() for p in problem.parameters])


def alone(base: Optimizer, problem: Problem) -> Run:
    """The sequential loop."""
    closure, run = make_closure(problem, base.zero_grad), Run()
    for t in range(STEPS):
        with step_rng(0, t):
            for p in problem.parameters:
                p.grad = None
            loss = closure(t)
            base.step()
        run.record(loss, problem)
    run.held = held(base, problem.parameters)
    return run


def wrapped(base: Optimizer, problem: Problem, steps: int = STEPS, **options: Any) -> Run:
    """The same through the wrapper."""
    optimizer = ParallelPicardOptimizer(base, **{"window": WINDOW, **options})
    closure, run = make_closure(problem, optimizer.zero_grad), Run()
    for _ in range(steps):
        run.record(optimizer.step(closure), problem)
    run.held = held(base, problem.parameters)
    run.strides = list(optimizer.stats.strides)
    return run


def held(thing: Any, parameters: list[nn.Parameter]) -> Any:
    """All that is reachable from an optimizer - state, groups, attributes, generators - as plain values."""
    places = {id(p): index for index, p in enumerate(parameters)}
    seen: set[int] = set()

    def plain(item: Any) -> Any:
        if isinstance(item, int) and item in places:
            return f"key of parameter {places[item]}"
        if id(item) in places:
            return f"parameter {places[id(item)]}"
        if isinstance(item, int) and item >> 40:
            return "an address"
        if hasattr(item, "__tensor_flatten__"):
            return plain(vars(item))
        if isinstance(item, Tensor):
            return item.detach().clone()
        if item is None or isinstance(item, bool | int | float | complex | str | bytes):
            return item
        if inspect.isroutine(item) or inspect.isclass(item) or inspect.ismodule(item):
            return None
        if id(item) in seen:
            return "seen"
        seen.add(id(item))
        if isinstance(item, dict):
            # Torch's own __setstate__, which any wrapper calls, adds "differentiable" to the defaults.
            return [
                (plain(k), plain(v))
                for k, v in item.items()
                if "_hooks" not in str(k) and k != "differentiable"
            ]
        if isinstance(item, list | tuple | deque):
            return [plain(value) for value in item]
        return of_object(item)

    def of_object(item: Any) -> Any:
        if isinstance(item, set | frozenset):
            return sorted(map(repr, item))
        if isinstance(item, random.Random):
            return item.getstate()
        if isinstance(item, torch.Generator):
            return item.get_state()
        if isinstance(item, np.random.Generator):
            return repr(item.bit_generator.state)
        if isinstance(item, np.ndarray):
            return torch.from_numpy(item.copy())
        return plain(vars(item)) if hasattr(item, "__dict__") else repr(type(item))

    return plain(thing)


@dataclass(frozen=True)
class Verdict:
    """What became of an optimizer.

    Attributes:
        word: "exact", "refused" or "fails alone" (without the wrapper too).
        last: Why, or for an exact one steps per sweep at the default tolerance.
    """

    word: str
    last: str


def judge(entry: Entry, pace: bool = True) -> Verdict:
    """Runs an optimizer alone and through the wrapper.

    Args:
        entry: The optimizer.
        pace: Whether to run it at the default tolerance too, for its steps per sweep.

    Raises:
        AssertionError: If the wrapper accepts it and then gives other bits, or never runs ahead.
        Exception: What the wrapper raised where the optimizer alone did not.
    """
    with surroundings(entry), contextlib.redirect_stdout(io.StringIO()):
        try:
            ParallelPicardOptimizer(*made(entry)[:1], window=WINDOW)
        except UnsupportedOptimizerError as error:
            return Verdict("refused", told(error))
        except Exception as error:
            return Verdict("fails alone", told(error))
        try:
            expected = alone(*made(entry))
        except Exception as error:
            return Verdict("fails alone", told(error))
        check(wrapped(*made(entry), tolerance=0), expected)
        if not pace:
            return Verdict("exact", "")
        return Verdict("exact", f"{LONG / len(wrapped(*made(entry), LONG).strides):.1f}")


def made(entry: Entry) -> tuple[Optimizer, Problem]:
    problem = entry.problem()
    return entry.make(problem), problem


def check(got: Run, expected: Run, ahead: int = 2) -> None:
    """The same bits, from a run that moved, and of which at least `ahead` steps came without a sweep of their own."""
    assert_same_bits(got.losses, expected.losses, "losses")
    assert_same_bits(got.parameters, expected.parameters, "parameters")
    assert_same_bits(got.held, expected.held, "held")
    first, last = expected.parameters[0], expected.parameters[-1]
    moved = max(float((a - b).abs().max()) for a, b in zip(first, last, strict=True))
    assert 1e-5 < moved < 2, f"after {STEPS} steps the parameters have moved by {moved}"
    assert sum(stride - 1 for stride in got.strides) >= ahead, got.strides


def told(error: BaseException) -> str:
    """An error's first line, fit for a table."""
    name = "" if isinstance(error, UnsupportedOptimizerError) else f"{type(error).__name__}: "
    text = name + (str(error).strip().splitlines() or ["(no message)"])[0]
    return re.sub(r"^base=\w+: ", "", text).replace("|", "/")


HEAD = """# Published optimizers

Made by `python -m tests.helpers.optimizer_table`, which runs each of them. A test fails if a run disagrees with
this table.

- *exact*: {steps} steps at `tolerance=0` and `window={window}` left the same bits as the sequential loop in losses,
  parameters, state, groups and attributes, over strides longer than 1, on parameters of one, two and four dimensions
  (matrices where it takes nothing else). The last column is steps per sweep at the default tolerance and the same
  window, over {long} steps of this tiny problem. It shows that running ahead works, not what to expect of your problem.
- *refused*: `UnsupportedOptimizerError` at construction, for this reason.
- *fails alone*: does not run on this machine (torch {torch} on a CPU) without picardopt either.

heavyball runs without `torch.compile` here, bitsandbytes with 8-bit states from 16 elements on.
"""

TAIL = """
## State in other places

The base is stepped in place. Before it runs ahead, everything that can be reached from it is recorded, and put back
afterwards: `state`, groups, attributes, nested optimizers, numpy arrays, generators of torch, numpy and `random`, and
tensors inside tensor subclasses. The global generators are seeded for the step. So optimizers that draw random numbers
(SGLD, stochastic rounding) and optimizers that wrap others are exact too.

Running ahead would change state that cannot be reached: a class or module variable, a closure, an iterator, an
attribute of a parameter, a file. So the first sweep, and now and then a later one, runs the base twice from the same
state over the same gradients. If the two end at different parameters, `UnsupportedOptimizerError` is raised and nothing
is committed. **What this cannot find** is hidden state that changes nothing within a window of steps, such as a
module-level counter that matters every 1000 steps. Keep such a counter in the optimizer, or use `window=1` on one
process, which never runs ahead and is exact for everything.

## Schedule-free optimizers

They keep two points and swap the parameters between them. Call `train()` and `eval()` on the optimizer that you
wrapped, where you would without picardopt: before training, and around validation and checkpoints. If swapping there
and back does not restore the parameters' bits (rounding), what was evaluated ahead is dropped. The run stays exact at
tolerance 0 and loses one short stride per validation. A step in eval mode raises their own error.
"""


COLUMNS = "| optimizer | verdict | steps per sweep, or why not |\n| --- | --- | --- |"


def row(entry: Entry, verdict: Verdict) -> str:
    return f"| `{entry.name}` | {verdict.word} | {verdict.last} |"


def read_table() -> dict[str, Verdict]:
    """The committed table, by name."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    return {name: Verdict(word, last) for name, word, last in rows}


def headings() -> list[str]:
    """One for each package, with the version that runs."""
    return [f"## {package} {version(package).partition('+')[0]}" for package in PACKAGES]


def lines() -> Iterator[str]:
    torch_version = version("torch").partition("+")[0]
    yield HEAD.format(steps=STEPS, window=WINDOW, long=LONG, torch=torch_version)
    verdicts, wrong = {}, []
    for entry in entries():
        try:
            verdicts[entry] = judge(entry)
        except Exception as error:
            wrong.append(f"{entry.name}: {error}")
    if wrong:
        raise SystemExit("\n".join(wrong))
    words = [verdict.word for verdict in verdicts.values()]
    counts = ", ".join(
        f"{words.count(word)} {word}" for word in ("exact", "refused", "fails alone")
    )
    yield f"{len(words)} optimizers: {counts}."
    for package, heading in zip(PACKAGES, headings(), strict=True):
        yield f"\n{heading}\n\n{COLUMNS}"
        yield from (row(e, v) for e, v in verdicts.items() if e.package == package)
    yield TAIL.rstrip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    TABLE.write_text("\n".join(lines()) + "\n")
    print(f"wrote {TABLE}")
