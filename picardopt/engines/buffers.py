"""What the ranks of a sweep send each other besides headers: losses and, where a slot has one rank, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from picardopt.layout import ParameterLayout, Row
from picardopt.memory import allocation
from picardopt.ranks import RankGrid

_ROOM = (
    1 << 14
)  # bytes for the loss and the generators' states of a drift, before it is known what they take
_UNIT = 1 << 10  # bytes


class SweepBuffers:
    """The messages of one size of sweep. A closure's gradients are written straight into this rank's message.

    Args:
        layout: The live tensors.
        grid: The ranks.
        rounds: Slots of each rank.
        room: Bytes for the losses of a rank; 0 for a first guess.
        device: The device of messages.

    Attributes:
        room: Bytes for the losses of a rank.
        bodies: uint8 tensor [ranks, room + gradients]; on a data axis [ranks, room]: its gradients are averaged first.
        rows: The drifts' gradients, [Picard ranks][rounds].
    """

    def __init__(
        self, layout: ParameterLayout, grid: RankGrid, rounds: int, room: int, device: torch.device
    ) -> None:
        self.layout, self.rounds, self.room = layout, rounds, room or rounds * _ROOM
        joined, size = grid.data.size == 1, grid.everyone.size
        lines = [ranks[0] if joined else index for index, ranks in enumerate(grid.table)]
        shape = (len(lines), rounds, layout.row_bytes)
        length = self.room + (rounds * layout.row_bytes if joined else 0)
        with allocation("the drifts of a sweep", len(lines) * rounds * layout.row_bytes, device):
            self.bodies = torch.zeros((size, length), dtype=torch.uint8, device=device)
            messages = (
                self.bodies[:, self.room :].view(shape)
                if joined
                else torch.zeros(shape, dtype=torch.uint8, device=device)
            )
            staged = layout.device.type != device.type
            self._messages = messages
            self._matrix = (
                torch.zeros(shape, dtype=torch.uint8, device=layout.device) if staged else messages
            )
        self.rows: list[list[Row]] = [
            [layout.row(line) for line in self._matrix[index]] for index in lines
        ]

    def stage(self, index: int) -> None:
        """Copies the gradients of one rank to its message, where they are on another device."""
        if self._matrix is not self._messages:
            self._messages[index].copy_(self._matrix[index])

    def unstage(self) -> None:
        """Copies the gradients of all messages to the rows, where these are on another device."""
        if self._matrix is not self._messages:
            self._matrix.copy_(self._messages)

    @property
    def gradients(self) -> Tensor:
        """The gradients' messages of a data axis, uint8 [Picard ranks, bytes]."""
        return self._messages.view(len(self._messages), -1)

    def next_room(self, length: int) -> int:
        """Returns the room for the losses of the next sweep, if the longest of this one have `length` bytes."""
        wanted = (length // _UNIT + 2) * _UNIT
        return wanted if length > self.room or 4 * wanted < self.room else self.room


def write(message: bytes, out: Tensor) -> None:
    """Writes the beginning of a uint8 tensor [n]: all of a message that is not longer."""
    if len(message) <= len(out):
        out[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
