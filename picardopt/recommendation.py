"""Which way to use some devices: the options with their predicted seconds a step, in a table and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from picardopt.links import Link
from picardopt.memory import size
from picardopt.planner import Measured, Option, best

WORTH_IT = 1.1
"""Factor by which an option must be faster than a simpler one to be recommended."""
_USELESS = 1.5
"""Mean stride below which guesses are of no use."""


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
        for kind in ("data parallel", "one device, batched", "Picard"):
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
            devices = f"{chosen.devices} devices" if chosen.devices > 1 else "one device"
            if chosen.data > 1:
                devices += f", {chosen.data} to a step's batch"
            if chosen.joined:
                devices += f", {chosen.slots} slots to a batched call"
            if split:
                gain += f" and {best(split).seconds / chosen.seconds:.1f} times as fast as data parallelism"
            return f"Run ahead with a window of {chosen.window} on {devices}: {gain}."
        if chosen.data > 1:
            first = f"Data parallelism on {chosen.data} devices is the better choice: {gain}."
        else:
            first = f"One device is the better choice: {milliseconds(chosen.seconds)} a step."
        return f"{first} {self._why_not_ahead()}".strip()

    def _why_not_ahead(self) -> str:
        ahead = [each for each in self.options if each.window > 1]
        error = self.measured.drift_error
        if not ahead:
            return ""
        longest, fastest = max(each.stride for each in ahead), best(ahead)
        if longest < _USELESS and error is not None:
            return (
                "Running ahead does not help here: the drift at the second guess is already off by "
                f"{100 * error:.0f} %."
            )
        return (
            f"Running ahead would take {milliseconds(fastest.seconds)} a step on "
            f"{fastest.devices} device{'s' * (fastest.devices > 1)}, at {fastest.stride:.1f} steps a sweep."
        )

    @property
    def table(self) -> str:
        """The best option of each kind, a line each."""
        by_kind = sorted(
            self.options,
            key=lambda each: (each.devices > 1, each.window > 1, each.data > 1, each.slots > 1),
        )
        kinds = dict.fromkeys(each.kind for each in by_kind)
        rows = [("", "devices", "window", "steps a sweep", "a step", "speed", "memory")]
        for kind in kinds:
            each = best([found for found in self.options if found.kind == kind])
            shape = f"{each.picard} x {each.data}" if each.picard > 1 < each.data else each.devices
            ahead = (f"{each.window}", f"{each.stride:.1f}") if each.window > 1 else ("", "")
            speed = f"{self.options[0].seconds / each.seconds:.2f} x"
            memory = f"+{size(each.memory)}" if each.memory is not None else ""
            rows.append((kind, f"{shape}", *ahead, milliseconds(each.seconds), speed, memory))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )
        return "\n".join(map(str.rstrip, lines))

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
        told = [f"a gradient by batch size: {drifts}", f"steps a sweep by window: {strides}"]
        if measured.joined:
            slots = ", ".join(
                f"{count}: {milliseconds(min(seconds))}"
                for count, seconds in sorted(measured.joined.items())
            )
            told.insert(1, f"slots that share their batched calls: {slots}")
        return "\n".join([*told, "", self.table, "", self.sentence])

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
