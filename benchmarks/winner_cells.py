"""Who wins at a batch on some devices, by `picardopt.planner` from what was measured; `winner_map.py` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from curves import BEYOND, MEASURED, Curve

from picardopt.links import Link
from picardopt.planner import Measured, Option, options

BATCHES, DEVICES, SLOTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16), (2, 4, 8)


@dataclass(frozen=True)
class Map:
    """One map.

    Attributes:
        title: Of the panel.
        curve: Seconds of a gradient by batch.
        joined: Seconds of so many slots of so many views that share their calls; None: as one gradient of all their
            views, which is a model.
        link: What joins the devices.
        commit: As in `Measured`.
        ahead: Likewise.
        sweep: Likewise.
        row_bytes: Likewise.
    """

    title: str
    curve: Curve
    joined: Mapping[int, Mapping[int, float]] | None
    link: Link
    commit: float
    ahead: float
    sweep: float
    row_bytes: int

    def measured(self, batch: int, strides: Mapping[int, float]) -> Measured:
        """What `picardopt.planner` reads, for a batch."""
        parts = [batch // n for n in range(1, DEVICES[-1] + 1) if batch % n == 0]
        drifts = {part: (self.curve.seconds(part),) for part in parts}
        costs = (self.commit, self.ahead, self.sweep, self.row_bytes)
        return Measured(drifts, *costs, strides, joined=self._joined(batch))

    def _joined(self, batch: int) -> dict[int, tuple[float, ...]]:
        if self.joined is None:
            return {slots: (self.curve.seconds(slots * batch),) for slots in SLOTS}
        return {slots: (seconds,) for slots, seconds in self.joined.get(batch, {}).items()}

    def how(self, batch: int, option: Option) -> str:
        """Where the seconds of an option's gradients are from."""
        if not option.joined:
            return self.curve.how(batch // option.data)
        if self.joined is not None:
            return MEASURED
        return max(self.curve.how(option.slots * batch), "between measured", key=len)


@dataclass(frozen=True)
class Cell:
    """Who wins at a batch on some devices.

    Attributes:
        option: The fastest.
        speed: Times as fast as one device.
        margin: Times as fast as the best of the other families.
        second: That family.
        how: Where the seconds of its gradients and of one device's are from.
    """

    option: Option
    speed: float
    margin: float
    second: str
    how: str


def family(option: Option) -> str:
    """The family of an option."""
    if option.kind.startswith("Picard x data"):
        return "Picard x data"
    if option.kind.startswith("Picard"):
        return "Picard"
    return "batched calls" if option.window > 1 else option.kind


def cell(of: Map, batch: int, devices: int, strides: Mapping[int, float]) -> Cell:
    """Computes one cell."""
    found = options(of.measured(batch, strides), of.link, devices)
    best: dict[str, Option] = {}
    for each in sorted(found, key=lambda option: (option.seconds, option.devices)):
        best.setdefault(family(each), each)
    first, *others = best
    winner, one = best[first], best["one device"]
    margin = best[others[0]].seconds / winner.seconds if others else 1.0
    hows = {of.how(batch, winner), of.how(batch, one)}
    how = next((each for each in (BEYOND, "between measured") if each in hows), MEASURED)
    second = others[0] if others else ""
    return Cell(winner, one.seconds / winner.seconds, margin, second, how)
