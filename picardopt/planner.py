"""Seconds a step on other devices, from what was measured on one: pure functions of numbers.

A split batch is never modelled as a part of the whole batch's time: a device has a smallest useful batch. What a part
of a batch takes must have been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from picardopt.links import Link, all_gather, all_reduce

WORTH_IT = 1.1
"""Factor by which an option must be faster than a simpler one to be recommended."""
CLOSE = 1.05
"""Factor within which two options are equally fast: then the one with fewer devices is better."""
MOST_SLOTS = 8
"""Largest number of slots that one rank evaluates in a sweep."""
MESSAGES = 2
"""Messages of a sweep besides its gradients: header and measures (gloo sends the header with the gradients). Each later
commit of it is one more."""
_USELESS = 1.5
"""Mean stride below which guesses are of no use."""


@dataclass(frozen=True)
class Measured:
    """What was measured on one device.

    Attributes:
        drifts: Seconds of one gradient by batch size, one or several evaluations of each; the largest batch is a
            step's own.
        commit: Seconds of one step of the base optimizer, with what a commit does besides.
        ahead: Seconds of one step ahead of time in a rollout, with the comparison of its iterate.
        sweep: Seconds of a rollout whatever the window: the optimizer's state captured and put back.
        row_bytes: Bytes of one gradient.
        strides: Mean number of steps that a sweep makes final, by window.
        drift_error: How far the drifts at the first two guesses are off, as a share of their length; None if unknown.
    """

    drifts: Mapping[int, Sequence[float]]
    commit: float
    ahead: float
    sweep: float
    row_bytes: int
    strides: Mapping[int, float]
    drift_error: float | None = None

    @property
    def batch(self) -> int:
        """A step's batch size."""
        return max(self.drifts)

    @property
    def parts(self) -> list[int]:
        """Numbers of devices that may share a batch: those whose equal part of it was measured."""
        return sorted(self.batch // part for part in self.drifts if self.batch % part == 0)


@dataclass(frozen=True)
class Option:
    """One way to use some devices.

    Attributes:
        picard: Ranks that evaluate different steps.
        data: Ranks that share a step and split its batch.
        slots: Steps that a rank evaluates in a sweep.
        stride: Steps that a sweep makes final.
        seconds: Seconds a step, predicted.
    """

    picard: int
    data: int
    slots: int
    stride: float
    seconds: float

    @property
    def devices(self) -> int:
        """Number of devices in use."""
        return self.picard * self.data

    @property
    def window(self) -> int:
        """Steps evaluated by a sweep; 1 where nothing runs ahead."""
        return self.picard * self.slots

    @property
    def kind(self) -> str:
        """What it is called in tables."""
        if self.window == 1:
            return "one device" if self.data == 1 else "data parallel"
        name = "Picard x data" if self.data > 1 else "Picard"
        return name if self.slots == 1 else f"{name}, several slots a rank"


def slowest(seconds: Sequence[float], ranks: int) -> float:
    """Returns the expected time of the slowest of some ranks, each of which takes one of the given times by chance."""
    count = len(seconds)
    return sum(
        value * ((place / count) ** ranks - ((place - 1) / count) ** ranks)
        for place, value in enumerate(sorted(seconds), start=1)
    )


def option(measured: Measured, link: Link, picard: int, data: int = 1, slots: int = 1) -> Option:
    """Returns an option with its predicted seconds a step.

    Args:
        measured: What one device takes.
        link: What joins the devices.
        picard: Ranks that evaluate different steps.
        data: Ranks that share a step and split its batch.
        slots: Steps that a rank evaluates in a sweep.

    Raises:
        ValueError: If the part of the batch was not measured, or the window's stride is not known.
    """
    if data not in measured.parts:
        raise ValueError(
            f"data={data}: a batch of {measured.batch} was measured in parts for {measured.parts} devices"
        )
    drifts, window = measured.drifts[measured.batch // data], picard * slots
    if window == 1:
        exchange = all_reduce(link, data, measured.row_bytes)
        return Option(1, data, 1, 1.0, slowest(drifts, data) + exchange + measured.commit)
    if window not in measured.strides:
        raise ValueError(f"picard={picard}, slots={slots}: the stride of {window} is not known")
    stride, ranks = measured.strides[window], picard * data
    mean = math.fsum(drifts) / len(drifts)
    # A rank's slots even out: their sum scatters by the root of their number.
    drift = slots * mean + math.sqrt(slots) * (slowest(drifts, ranks) - mean)
    exchange = sum(all_gather(link, n, measured.row_bytes) for n in (picard, data)) * slots
    if ranks > 1:
        exchange += (MESSAGES + stride - 1) * link.latency
    rollout = measured.sweep + (window + stride) * measured.ahead
    seconds = (drift + exchange + rollout) / stride + measured.commit
    return Option(picard, data, slots, stride, seconds)


def options(measured: Measured, link: Link, devices: int) -> list[Option]:
    """Returns every option on at most so many devices whose part and stride are known; one device is the first."""
    return [option(measured, link, *shape) for shape in _shapes(measured, devices)]


def _shapes(measured: Measured, devices: int) -> Iterator[tuple[int, int, int]]:
    for data in measured.parts:
        if data <= devices:
            yield 1, data, 1
        for picard in range(2, devices // data + 1):
            for slots in range(1, MOST_SLOTS + 1):
                if picard * slots in measured.strides:
                    yield picard, data, slots


def best(found: Sequence[Option]) -> Option:
    """Returns the fastest option; of equally fast ones that with the fewest devices, then the smallest window."""
    fastest = min(each.seconds for each in found)
    close = [each for each in found if each.seconds <= CLOSE * fastest]
    return min(close, key=lambda each: (each.devices, each.window, each.seconds))


@dataclass(frozen=True)
class Plan:
    """What to do with some devices; `print` it.

    Attributes:
        devices: How many there are.
        link: What joins them.
        measured: What was measured on one.
        options: Every way to use them, with predicted seconds a step; one device is the first.
    """

    devices: int
    link: Link
    measured: Measured
    options: Sequence[Option]

    @property
    def recommended(self) -> Option:
        """The option to take: running ahead, or splitting a batch, only where it is worth it."""
        chosen = self.options[0]
        for kind in ("data parallel", "Picard"):
            others = self._of(kind)
            if others and best(others).seconds * WORTH_IT <= chosen.seconds:
                chosen = best(others)
        return chosen

    def _of(self, kind: str) -> list[Option]:
        return [each for each in self.options if each.kind.startswith(kind)]

    @property
    def sentence(self) -> str:
        """The recommendation in plain words."""
        chosen, split = self.recommended, self._of("data parallel")
        faster = f"{self.options[0].seconds / chosen.seconds:.1f} times as fast as one device"
        gain = f"{milliseconds(chosen.seconds)} a step, {faster}"
        if chosen.window > 1:
            devices = f"{chosen.devices} devices"
            if chosen.data > 1:
                devices += f", {chosen.data} to a step's batch"
            if split:
                gain += f" and {best(split).seconds / chosen.seconds:.1f} times as fast as data parallelism"
            return f"Run ahead with a window of {chosen.window} on {devices}: {gain}."
        if chosen.data > 1:
            first = f"Data parallelism on {chosen.data} devices is the better choice: {gain}."
        else:
            first = f"One device is the better choice: {milliseconds(chosen.seconds)} a step."
        return f"{first} {self._why_not_ahead()}".strip()

    def _why_not_ahead(self) -> str:
        ahead, error = self._of("Picard"), self.measured.drift_error
        if not ahead:
            return ""
        longest, fastest = max(each.stride for each in ahead), best(ahead)
        if longest < _USELESS and error is not None:
            return (
                "Running ahead does not help here: the drift at the second guess is already off by "
                f"{100 * error:.0f} %."
            )
        return (
            f"Running ahead would take {milliseconds(fastest.seconds)} a step on {fastest.devices} devices, at "
            f"{fastest.stride:.1f} steps a sweep."
        )

    @property
    def table(self) -> str:
        """The best option of each kind, a line each."""
        by_kind = sorted(
            self.options, key=lambda each: (each.window > 1, each.data > 1, each.slots > 1)
        )
        kinds = dict.fromkeys(each.kind for each in by_kind)
        rows = [("", "devices", "window", "steps a sweep", "a step", "speed")]
        for kind in kinds:
            each = best([found for found in self.options if found.kind == kind])
            shape = f"{each.picard} x {each.data}" if each.picard > 1 < each.data else each.devices
            ahead = (f"{each.window}", f"{each.stride:.1f}") if each.window > 1 else ("", "")
            speed = f"{self.options[0].seconds / each.seconds:.2f} x"
            rows.append((kind, f"{shape}", *ahead, milliseconds(each.seconds), speed))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def __str__(self) -> str:
        measured = self.measured
        drifts = ", ".join(
            f"{batch}: {milliseconds(min(seconds))}"
            for batch, seconds in sorted(measured.drifts.items(), reverse=True)
        )
        strides = ", ".join(
            f"{window}: {measured.strides[window]:.1f}"
            for window in (2, 4, 8, 16, 32, 64)
            if window in measured.strides
        )
        return (
            f"a gradient by batch size: {drifts}\nsteps a sweep by window: {strides}\n\n{self.table}\n\n"
            f"{self.sentence}"
        )

    def as_dict(self) -> dict[str, object]:
        """Returns all of it as plain values, for a JSON file."""
        return {
            "devices": self.devices,
            "link": asdict(self.link),
            "measured": asdict(self.measured),
            "options": [{"kind": each.kind, **asdict(each)} for each in self.options],
            "recommended": {"kind": self.recommended.kind, **asdict(self.recommended)},
            "sentence": self.sentence,
        }


def milliseconds(seconds: float) -> str:
    """Returns a time in milliseconds with three significant figures."""
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
