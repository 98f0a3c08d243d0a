"""The ranks of a grid evaluate a window together: SPMD, every rank is a worker.

In a sweep each rank evaluates its slots: slot j on the ranks of data row j mod P, with P Picard ranks. Then all ranks
exchange a header of fixed size (the sweep and whether it succeeded) and, in the same exchange, losses, errors and
gradients, of the lengths of the sweep before. A rank whose closure raised still takes part, so that all ranks raise the
same error. Nothing but the headers is used before these agreed; losses that do not fit follow then. On a data axis the
gradients follow too, along two axes: each data row averages its own, then the Picard ranks exchange the means. With N
data ranks and D parameters every rank sends and receives (P - 1 + N - 1) D numbers per slot that it evaluated, instead
of the (P N - 1) D of one exchange among all ranks.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from picardopt.compat import add_note, broadcast
from picardopt.ddp_guard import DdpGuard
from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.engines.average import RowAverage, average_drifts
from picardopt.engines.base import ManySlots, SweepHeader, usable_prefix
from picardopt.engines.buffers import SweepBuffers, write
from picardopt.engines.headers import Kind, Table, compare, read, words
from picardopt.engines.packing import dumps, pack, sendable, unpack
from picardopt.errors import PicardError, RankLostError, RankMismatchError
from picardopt.interrupts import raised_by_signal
from picardopt.layout import ParameterLayout, Row
from picardopt.ranks import RankGrid, RankGroup
from picardopt.stats import Stats, phase
from picardopt.transport import Payload, make_transport

if TYPE_CHECKING:
    from picardopt.joint import JointEvaluation

_LAST_MESSAGE = 1.0  # seconds


class DistributedEngine(ManySlots):
    """Evaluates slots on the ranks of a grid.

    Args:
        grid: The ranks.
        device: The parameters' device.
        timeout: Seconds to wait for a rank.
        stats: Times the evaluations and exchanges.
    """

    def __init__(self, grid: RankGrid, device: torch.device, timeout: float, stats: Stats) -> None:
        self.rank, self.size = grid.everyone.rank, grid.everyone.size
        self.data_size = grid.data.size
        self._grid, self._stats = grid, stats
        self._transport = make_transport(grid.everyone.group, device, timeout)
        self._guard = DdpGuard(grid.data)
        self._buffers: SweepBuffers | None = None
        self._room = 0
        self._average = RowAverage(grid.data, self._transport)

    def start(self, layout: ParameterLayout, head: Row, header: SweepHeader) -> None:
        """Compares the ranks' headers, except for the parameters, and broadcasts the first rank's parameters."""
        with phase(self._stats, "exchange"):
            compare(self._gather_headers(Kind.START, header.as_list()), ignore=("parameters",))
            buffer = head.buffer.to(self._transport.device)
            for ranks in (self._grid.picard, self._grid.data):
                if ranks.size > 1:
                    broadcast(buffer, ranks.group, ranks.peers[0])
            head.buffer.copy_(buffer)

    def evaluate(
        self,
        layout: ParameterLayout,
        evaluate: EvaluateSlot,
        header: SweepHeader,
        joint: JointEvaluation | None = None,
    ) -> tuple[list[Drift], int]:
        """See `Engine.evaluate`."""
        picard = self._grid.picard
        buffers = self._allocate(layout, -(-header.slots // picard.size))
        with phase(self._stats, "drift"):
            slots = range(picard.rank, header.slots, picard.size)
            rows, guarded = buffers.rows[picard.rank], self._guard.wrap(layout, evaluate)
            try:
                mine = self.evaluate_many(
                    lambda slot, row: sendable(guarded(slot, row)), slots, rows, self._until, joint
                )
            except Exception as error:  # no closure's own: the others must hear of it
                step, trace = header.step + picard.rank, traceback.format_exc()
                mine = [Drift(step, rows[0], outcome=Outcome.FAILED, error=error, trace=trace)]
        worst = max(mine, key=lambda drift: drift.outcome, default=None)
        with phase(self._stats, "exchange"), self._leaving(worst.error if worst else None):
            return self._gather(buffers, mine, header)

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """See `Engine.average`."""
        row = self._grid.data
        if row.size == 1:
            return drift
        with phase(self._stats, "exchange"), self._leaving(drift.error):
            drift = sendable(drift)
            message = dumps([pack(drift)])
            lengths = self._gather_headers(Kind.FLAG, [len(message)], row)[:, 0]
            packs = self._gather_bytes(message, lengths, row)
            parts = [
                drift if rank == self.rank else unpack(fields[0], drift.row, rank)
                for rank, fields in zip(row.labels, packs, strict=True)
            ]
            if all(part.outcome < Outcome.FAILED for part in parts):
                self._average(layout, drift.row)
            return average_drifts(parts, drift.row)

    @property
    def _until(self) -> Outcome:
        """The outcome at which a rank skips its later slots.

        The ranks of a data row must continue together: a collective call in the closure (DistributedDataParallel's)
        would wait for a rank that stopped.
        """
        return Outcome.NONFINITE if self.data_size == 1 else Outcome.INTERRUPTED

    def agree(
        self, table: Tensor, columns: int, numbers: Tensor | None = None
    ) -> tuple[list[list[float]], list[float]]:
        """See `Engine.agree`; all ranks take one rank's numbers, because rounding may differ between them."""
        with phase(self._stats, "exchange"):
            count, cells = table.shape[1], table.shape[0] * columns
            more = 0 if numbers is None else numbers.numel()
            local = torch.zeros(1 + cells + more, dtype=torch.float64, device=table.device)
            local[0] = count
            local[1 : 1 + cells].view(table.shape[0], columns)[:, :count] = table
            if numbers is not None:
                local[1 + cells :] = numbers
            local = local.to(self._transport.device)
            shared = torch.empty(
                (self.size, local.numel() * 8), dtype=torch.uint8, device=local.device
            )
            self._transport.all_gather(local.view(torch.uint8), shared, self._grid.everyone)
            received = shared.view(torch.float64).cpu()
            shortest = int(received[:, 0].min())
            first = received[0, 1 : 1 + cells].view(table.shape[0], columns)
            return first[:, :shortest].tolist(), received[0, 1 + cells :].tolist()

    def share_numbers(
        self, values: list[int], error: BaseException | None = None
    ) -> list[list[int]]:
        """See `Engine.share_numbers`."""
        with phase(self._stats, "exchange"), self._leaving(error):
            table = self._gather_headers(Kind.FLAG, values)
            return [[int(x) for x in row[: len(values)]] for row in table]

    @contextmanager
    def _leaving(self, error: BaseException | None) -> Iterator[None]:
        """Waits at most a second for other ranks if a signal ends this one (`error`).

        If a peer is lost after this rank's closure failed, that failure is added as a note: it is the probable cause
        of the peer's timeout.
        """
        if error is None or not raised_by_signal(error):
            try:
                yield
            except RankLostError as lost:
                if error is not None:
                    trace = "".join(traceback.format_exception(error))
                    add_note(lost, f"before that the closure raised on this rank:\n{trace}")
                raise
            return
        timeout = self._transport.timeout
        self._transport.timeout = min(timeout, _LAST_MESSAGE)
        try:
            yield
        except PicardError:
            raise error from None
        finally:
            self._transport.timeout = timeout

    def _allocate(self, layout: ParameterLayout, rounds: int) -> SweepBuffers:
        buffers = self._buffers
        key = layout, rounds, self._room
        if buffers is None or (buffers.layout, buffers.rounds, buffers.room) != key:
            self._buffers = buffers = None  # frees its memory
            buffers = SweepBuffers(layout, self._grid, rounds, self._room, self._transport.device)
            self._buffers, self._room = buffers, buffers.room
        return buffers

    def _gather(
        self, buffers: SweepBuffers, mine: list[Drift], header: SweepHeader
    ) -> tuple[list[Drift], int]:
        message = dumps([pack(drift) for drift in mine])
        fatal = any(
            drift.outcome is Outcome.INTERRUPTED
            or (drift.outcome is Outcome.FAILED and drift.step == header.step)
            for drift in mine
        )
        write(message, buffers.bodies[self.rank, : buffers.room])
        if self.data_size == 1:
            buffers.stage(self.rank)
        values = [len(message), int(fatal), *header.as_list()]
        headers = self._gather_sweep(values, buffers)
        lengths, fatalities = headers[:, 0], headers[:, 1]
        if lengths.max() <= buffers.room:
            packs = _unpickle(buffers.bodies[:, : buffers.room], lengths)
        else:
            packs = self._gather_bytes(message, lengths)
        self._room = buffers.next_room(int(lengths.max()))
        if not fatalities.any():
            if self.data_size > 1:
                self._gather_rows(buffers, len(mine))
            buffers.unstage()
        received: dict[int, list[Drift]] = {}
        for ranks, rows in zip(self._grid.table, buffers.rows, strict=True):
            for rank in ranks:
                sent = zip(packs[rank], rows, strict=False)
                received[rank] = [unpack(fields, row, rank) for fields, row in sent]
        received[self.rank] = mine
        for rank in range(self.size):
            for drift in received[rank]:
                if drift.outcome is Outcome.INTERRUPTED and drift.error is not None:
                    raise drift.error
        drifts = []
        for slot in range(header.slots):
            round_index, picard_rank = divmod(slot, self._grid.picard.size)
            ranks = self._grid.table[picard_rank]
            parts = [received[rank][round_index : round_index + 1] for rank in ranks]
            # A rank that stopped at a bad slot lacks the later ones, which are not needed.
            if all(parts):
                row = buffers.rows[picard_rank][round_index]
                drifts.append(average_drifts([part for (part,) in parts], row))
        return usable_prefix(drifts), len(drifts)

    def _gather_sweep(self, values: list[int], buffers: SweepBuffers) -> Table:
        """Returns the values of every rank, and receives the bodies if their headers agree."""
        header, everyone, bodies = (
            self._header(Kind.SWEEP, values),
            self._grid.everyone,
            buffers.bodies,
        )
        shared = torch.empty((self.size, len(header)), dtype=torch.uint8, device=header.device)

        def check() -> None:
            compare(read(Kind.SWEEP, shared, everyone.labels)[:, 2:])

        payload = Payload(bodies[self.rank], bodies, check)
        try:
            self._transport.all_gather(header, shared, everyone, payload)
        except RankMismatchError:
            self._buffers = None  # the other ranks' bodies may still arrive in these
            raise
        return read(Kind.SWEEP, shared, everyone.labels)

    def _gather_headers(
        self, kind: Kind, values: list[int], ranks: RankGroup | None = None
    ) -> Table:
        """Returns the values of every rank of a group (default: all), int64 [ranks, LENGTH - 1]."""
        ranks, header = ranks or self._grid.everyone, self._header(kind, values)
        shared = torch.empty((ranks.size, len(header)), dtype=torch.uint8, device=header.device)
        self._transport.all_gather(header, shared, ranks)
        return read(kind, shared, ranks.labels)

    def _header(self, kind: Kind, values: list[int]) -> Tensor:
        return words(kind, values).to(self._transport.device).view(torch.uint8)

    def _gather_bytes(
        self, message: bytes, lengths: Table, ranks: RankGroup | None = None
    ) -> list[Any]:
        ranks = ranks or self._grid.everyone
        local = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        write(message, local)
        local = local.to(self._transport.device)
        shared = torch.empty((ranks.size, local.numel()), dtype=torch.uint8, device=local.device)
        self._transport.all_gather(local, shared, ranks)
        return _unpickle(shared, lengths)

    def _gather_rows(self, buffers: SweepBuffers, rounds: int) -> None:
        """Averages the gradients of this rank's data row, and exchanges the means."""
        me = self._grid.picard.rank
        for row in buffers.rows[me][:rounds]:
            self._average(buffers.layout, row)
        buffers.stage(me)
        flat = buffers.gradients
        self._transport.all_gather(flat[me], flat, self._grid.picard)


def _unpickle(messages: Tensor, lengths: Table) -> list[Any]:
    rows = messages.cpu().numpy()
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
