"""The ranks of a grid evaluate a window together: SPMD, every rank is a worker.

In a sweep each rank evaluates its slots: slot j on the ranks of data row j mod P, with P Picard ranks. Then all ranks
exchange a header of fixed size (the sweep and whether it succeeded), then losses and errors. A rank whose closure
raised still takes part, so that all ranks raise the same error. Message lengths are used only after the headers
agreed. Gradients are exchanged along two axes: each data row averages its own, then the Picard ranks exchange the
means. With N data ranks and D parameters every rank sends and receives (P - 1 + N - 1) D numbers per slot that it
evaluated, instead of the (P N - 1) D of one exchange among all ranks.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.ddp_guard import DdpGuard
from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.engines.average import RowAverage, average_drifts
from picardopt.engines.base import OneByOne, SweepHeader, usable_prefix
from picardopt.engines.packing import pack, sendable, unpack
from picardopt.errors import PicardError, RankLostError, RankMismatchError
from picardopt.interrupts import raised_by_signal
from picardopt.layout import ParameterLayout, Row
from picardopt.ranks import RankGrid, RankGroup
from picardopt.stats import Stats
from picardopt.transport import make_transport

_HEADER_LENGTH = 16  # int64 words of every header, whatever its kind
_LAST_MESSAGE = 1.0  # seconds
_START, _SWEEP, _FLAG = 0x70696361_01, 0x70696361_02, 0x70696361_03  # kinds of header


class DistributedEngine(OneByOne):
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
        self._layout: ParameterLayout | None = None
        self._matrix = torch.empty(0, dtype=torch.uint8)  # [Picard ranks, rounds, row_bytes]
        self._staging: Tensor | None = None
        self._rows: list[list[Row]] = []  # [Picard ranks][rounds]
        self._average = RowAverage(grid.data, self._transport)

    def start(self, layout: ParameterLayout, head: Row, header: SweepHeader) -> None:
        """Compares the ranks' headers, except for the parameters, and broadcasts the first rank's parameters."""
        with self._stats.phase("exchange"):
            self._compare(self._gather_headers(_START, header.as_list()), ignore=("parameters",))
            buffer = head.buffer.to(self._transport.device)
            for ranks in (self._grid.picard, self._grid.data):
                if ranks.size > 1:
                    dist.broadcast(buffer, group=ranks.group, group_src=ranks.peers[0])
            head.buffer.copy_(buffer)

    def evaluate(
        self, layout: ParameterLayout, evaluate: EvaluateSlot, header: SweepHeader
    ) -> tuple[list[Drift], int]:
        """See `Engine.evaluate`."""
        picard = self._grid.picard
        self._allocate(layout, -(-header.slots // picard.size))
        with self._stats.phase("drift"):
            slots = range(picard.rank, header.slots, picard.size)
            rows, guarded = self._rows[picard.rank], self._guard.wrap(layout, evaluate)
            mine = self.evaluate_many(
                lambda slot, row: sendable(guarded(slot, row)), slots, rows, self._until
            )
        worst = max(mine, key=lambda drift: drift.outcome, default=None)
        with self._stats.phase("exchange"), self._leaving(worst.error if worst else None):
            return self._gather(layout, mine, header)

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """See `Engine.average`."""
        row = self._grid.data
        if row.size == 1:
            return drift
        with self._stats.phase("exchange"), self._leaving(drift.error):
            drift = sendable(drift)
            message = pickle.dumps([pack(drift)])
            lengths = self._gather_headers(_FLAG, [len(message)], row)[:, 0]
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
        with self._stats.phase("exchange"):
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
        with self._stats.phase("exchange"), self._leaving(error):
            table = self._gather_headers(_FLAG, values)
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
                    lost.add_note(f"before that the closure raised on this rank:\n{trace}")
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

    def _allocate(self, layout: ParameterLayout, rounds: int) -> None:
        if layout is self._layout and rounds == len(self._rows[0]):
            return
        self._layout = layout
        shape = (self._grid.picard.size, rounds, layout.row_bytes)
        self._matrix = torch.zeros(shape, dtype=torch.uint8, device=layout.device)
        self._rows = [[layout.row(line) for line in lines] for lines in self._matrix]
        same_device = layout.device.type == self._transport.device.type
        self._staging = None if same_device else torch.empty(shape, dtype=torch.uint8)

    def _gather(
        self, layout: ParameterLayout, mine: list[Drift], header: SweepHeader
    ) -> tuple[list[Drift], int]:
        message = pickle.dumps([pack(drift) for drift in mine])
        fatal = any(
            drift.outcome is Outcome.INTERRUPTED
            or (drift.outcome is Outcome.FAILED and drift.step == header.step)
            for drift in mine
        )
        headers = self._gather_headers(_SWEEP, [len(message), int(fatal), *header.as_list()])
        lengths, fatalities = headers[:, 0], headers[:, 1]
        self._compare(headers[:, 2:])
        packs = self._gather_bytes(message, lengths)
        if not fatalities.any():
            self._gather_rows(layout, len(mine))
        received: dict[int, list[Drift]] = {}
        for ranks, rows in zip(self._grid.table, self._rows, strict=True):
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
                row = self._rows[picard_rank][round_index]
                drifts.append(average_drifts([part for (part,) in parts], row))
        return usable_prefix(drifts), len(drifts)

    def _gather_headers(
        self, kind: int, values: list[int], ranks: RankGroup | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns the values of every rank of a group (default: all), int64 [ranks, _HEADER_LENGTH - 1]."""
        ranks = ranks or self._grid.everyone
        words = [kind, *values, *[0] * (_HEADER_LENGTH - 1 - len(values))]
        local = torch.tensor(words, dtype=torch.int64, device=self._transport.device)
        shared = torch.empty((ranks.size, 8 * len(words)), dtype=torch.uint8, device=local.device)
        self._transport.all_gather(local.view(torch.uint8), shared, ranks)
        table: np.ndarray[Any, np.dtype[np.int64]] = shared.view(torch.int64).cpu().numpy()
        if (table[:, 0] != kind).any():
            listed = ", ".join(
                f"rank {rank}: {_KINDS.get(k, k)}"
                for rank, k in zip(ranks.labels, table[:, 0], strict=True)
            )
            raise RankMismatchError(
                f"the ranks are in different places of the program ({listed}): call step equally often, and "
                "change parameters or options on all ranks alike"
            )
        return table[:, 1:]

    def _gather_bytes(
        self,
        message: bytes,
        lengths: np.ndarray[Any, np.dtype[np.int64]],
        ranks: RankGroup | None = None,
    ) -> list[Any]:
        ranks = ranks or self._grid.everyone
        local = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        local[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        local = local.to(self._transport.device)
        shared = torch.empty((ranks.size, local.numel()), dtype=torch.uint8, device=local.device)
        self._transport.all_gather(local, shared, ranks)
        rows = shared.cpu().numpy()
        return [
            pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    def _gather_rows(self, layout: ParameterLayout, rounds: int) -> None:
        me = self._grid.picard.rank
        if self.data_size > 1:
            for row in self._rows[me][:rounds]:
                self._average(layout, row)
        matrix = self._matrix if self._staging is None else self._staging
        if self._staging is not None:
            self._staging[me].copy_(self._matrix[me])
        flat = matrix.view(self._grid.picard.size, -1)
        self._transport.all_gather(flat[me], flat, self._grid.picard)
        if self._staging is not None:
            self._matrix.copy_(self._staging)

    def _compare(
        self, headers: np.ndarray[Any, np.dtype[np.int64]], ignore: tuple[str, ...] = ()
    ) -> None:
        for name, column in zip(SweepHeader.names(), headers.T, strict=False):
            if name not in ignore and (column != column[0]).any():
                listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(column))
                raise RankMismatchError(
                    f"the ranks disagree about {_MEANING[name]} ({listed}): build the same model and optimizer on "
                    "every rank, call step equally often, and change parameters on all ranks alike"
                )


_KINDS = {_START: "construction", _SWEEP: "a sweep", _FLAG: "a check of a queued step"}
_MEANING = {
    "step": "the step",
    "sweep": "the number of sweeps",
    "slots": "the number of slots",
    "window": "the window",
    "seed": "the seed",
    "options": "an option (tolerance, secants, predictor, total_steps, nonfinite, audit)",
    "layout": "the parameters' shapes or dtypes",
    "parameters": "the parameters' values",
}
