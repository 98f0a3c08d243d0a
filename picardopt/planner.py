"""Seconds a step on other devices, from what was measured on one: pure functions of numbers.

A split batch is never modelled as a part of the whole batch's time: a device has a smallest useful batch. What a part
of a batch takes must have been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from picardopt.links import Link, all_gather, all_reduce

CLOSE = 1.05
"""Factor within which two options are equally fast: then the one with fewer devices is better."""
MOST_SLOTS = 8
"""Largest number of slots that one rank evaluates in a sweep."""
MESSAGES = 2
"""Messages of a sweep besides its gradients: header and measures (gloo sends the header with the gradients). Each later
commit of it is one more."""


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
        joined: Seconds of so many slots that one device evaluates together, by their number, where the closure makes
            batched calls (`picardopt.batched`): each of the whole batch, measured, one or several times.
        memory: Bytes that running ahead takes on every device besides what one step takes, by window; empty if unknown.
    """

    drifts: Mapping[int, Sequence[float]]
    commit: float
    ahead: float
    sweep: float
    row_bytes: int
    strides: Mapping[int, float]
    drift_error: float | None = None
    joined: Mapping[int, Sequence[float]] = field(default_factory=dict)
    memory: Mapping[int, int] = field(default_factory=dict)

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
        joined: Whether a rank's slots share their batched calls.
        memory: Bytes that it takes on every device besides what one step takes; None if unknown.
    """

    picard: int
    data: int
    slots: int
    stride: float
    seconds: float
    joined: bool = False
    memory: int | None = None

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
        name = "Picard x data" if self.data > 1 else "Picard" if self.picard > 1 else "one device"
        if self.slots == 1:
            return name
        return f"{name}, batched calls" if self.joined else f"{name}, several slots a rank"


def slowest(seconds: Sequence[float], ranks: int) -> float:
    """Returns the expected time of the slowest of some ranks, each of which takes one of the given times by chance."""
    count = len(seconds)
    return sum(
        value * ((place / count) ** ranks - ((place - 1) / count) ** ranks)
        for place, value in enumerate(sorted(seconds), start=1)
    )


def option(
    measured: Measured,
    link: Link,
    picard: int,
    data: int = 1,
    slots: int = 1,
    *,
    cores: int | None = None,
) -> Option:
    """Returns an option with its predicted seconds a step.

    Args:
        measured: What one device takes.
        link: What joins the devices.
        picard: Ranks that evaluate different steps.
        data: Ranks that share a step and split its batch.
        slots: Steps that a rank evaluates in a sweep; their calls are shared where `measured` has that.
        cores: Processor cores that all ranks share; default: enough for all. Where there are fewer than ranks, what a
            rank does besides its drifts stands in line: every rank does all of it, and all at the same time.

    Raises:
        ValueError: If the part of the batch, or so many joined slots, were not measured, or the window's stride is not
            known.
    """
    if data not in measured.parts:
        raise ValueError(
            f"data={data}: a batch of {measured.batch} was only measured for {measured.parts} devices that share it; "
            "measure a closure for that part of it"
        )
    drifts, window, ranks = measured.drifts[measured.batch // data], picard * slots, picard * data
    line = 1.0 if cores is None else max(1.0, ranks / cores)
    if window == 1:
        exchange = all_reduce(link, data, measured.row_bytes)
        return Option(1, data, 1, 1.0, slowest(drifts, data) + exchange + line * measured.commit)
    if window not in measured.strides:
        raise ValueError(
            f"picard={picard}, slots={slots}: the stride of a window of {window} was not measured; there are those of "
            f"{sorted(measured.strides)}"
        )
    stride, joined = measured.strides[window], slots > 1 and bool(measured.joined)
    drift = _drifts(measured, data, slots, ranks)
    exchange = sum(all_gather(link, n, measured.row_bytes) for n in (picard, data)) * slots
    if ranks > 1:
        exchange += (MESSAGES + stride - 1) * link.latency
    rollout = measured.sweep + (window + stride) * measured.ahead
    seconds = (drift + exchange + line * rollout) / stride + line * measured.commit
    return Option(picard, data, slots, stride, seconds, joined, measured.memory.get(window))


def _drifts(measured: Measured, data: int, slots: int, ranks: int) -> float:
    """Returns the seconds in which the slowest of some ranks evaluates its slots."""
    if slots > 1 and measured.joined:
        if data > 1 or slots not in measured.joined:
            raise ValueError(
                f"slots={slots}, data={data}: joined slots were measured for data=1, slots={sorted(measured.joined)}"
            )
        return slowest(measured.joined[slots], ranks)
    drifts = measured.drifts[measured.batch // data]
    mean = math.fsum(drifts) / len(drifts)
    # A rank's slots even out: their sum scatters by the root of their number.
    return slots * mean + math.sqrt(slots) * (slowest(drifts, ranks) - mean)


def options(
    measured: Measured, link: Link, devices: int, *, cores: int | None = None
) -> list[Option]:
    """Returns every option on at most so many devices whose part and stride are known; one device is the first."""
    return [option(measured, link, *shape, cores=cores) for shape in _shapes(measured, devices)]


def _shapes(measured: Measured, devices: int) -> Iterator[tuple[int, int, int]]:
    for data in measured.parts:
        if data <= devices:
            yield 1, data, 1
        for picard in range(1, devices // data + 1):
            for slots in _slots(measured, data):
                if picard * slots in measured.strides and (picard > 1 or slots in measured.joined):
                    yield picard, data, slots


def _slots(measured: Measured, data: int) -> list[int]:
    """Returns how many slots a rank may evaluate: where they share calls, what was measured."""
    if not measured.joined:
        return list(range(1, MOST_SLOTS + 1))
    return [1, *sorted(slots for slots in measured.joined if slots > 1 and data == 1)]


def best(found: Sequence[Option]) -> Option:
    """Returns the fastest option; of equally fast ones that with the fewest devices, then the smallest window."""
    fastest = min(each.seconds for each in found)
    close = [each for each in found if each.seconds <= CLOSE * fastest]
    return min(close, key=lambda each: (each.devices, each.window, each.seconds))
