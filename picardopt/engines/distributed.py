"""The ranks of a grid evaluate a window together: SPMD, every rank a worker.

A sweep: each rank evaluates its slots (slot j on the ranks of data row j mod Picard ranks), then all ranks
exchange a fixed-size header (what they computed, whether it went well), then losses and errors. A rank whose
closure raised still answers, so that all ranks raise the same error; payload sizes are only trusted after the
headers agreed. Gradients go along two axes: each data row averages its own, then the Picard ranks exchange the
means: with P Picard ranks, N data ranks and D parameters every rank sends and receives (P - 1 + N - 1) D floats per
slot it evaluated, instead of the (P N - 1) D of one exchange among all.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.drift import Drift, Outcome
from picardopt.engines.average import RowAverage, average_drifts
from picardopt.engines.base import Claim, EvaluateSlot, usable_prefix
from picardopt.engines.exchange import make_exchange
from picardopt.engines.packing import check_sendable, pack, unpack
from picardopt.errors import PicardError, RankLostError, RankMismatchError
from picardopt.interrupts import raised_by_signal
from picardopt.layout import ParameterLayout, Row
from picardopt.mesh import Circle, ForeignModules, Grid
from picardopt.stats import Stats

_HEADER_LENGTH = 16  # int64 words of every header, whatever its kind
_LAST_WORDS = 1.0  # seconds
_START, _SWEEP, _FLAG = 0x70696361_01, 0x70696361_02, 0x70696361_03  # kinds of header


class DistributedEngine:
    """Evaluates slots on the ranks of a grid.

    Args:
        grid: The ranks.
        device: Where the parameters lie.
        timeout: Seconds that a rank is waited for.
        stats: Where the seconds go.
    """

    def __init__(self, grid: Grid, device: torch.device, timeout: float, stats: Stats) -> None:
        self.rank, self.size = grid.everyone.place, grid.everyone.size
        self.data_size = grid.data.size
        self._grid, self._stats = grid, stats
        self._exchange = make_exchange(grid.everyone.group, device, timeout)
        self._modules = ForeignModules(grid.data)
        self._layout: ParameterLayout | None = None
        self._matrix = torch.empty(0, dtype=torch.uint8)  # [Picard ranks, rounds, row_bytes]
        self._staging: Tensor | None = None
        self._rows: list[list[Row]] = []  # [Picard ranks][rounds]
        self._average = RowAverage(grid.data, self._exchange)

    def start(self, layout: ParameterLayout, head: Row, claim: Claim) -> None:
        """Compares the ranks' claims, parameters apart, and gives all of them the first rank's parameters."""
        with self._stats.phase("exchange"):
            self._compare(self._share_header(_START, claim.as_list()), ignore=("parameters",))
            buffer = head.buffer.to(self._exchange.device)
            for circle in (self._grid.picard, self._grid.data):
                if circle.size > 1:
                    dist.broadcast(buffer, group=circle.group, group_src=circle.peers[0])
            head.buffer.copy_(buffer)

    def evaluate(
        self, layout: ParameterLayout, evaluate: EvaluateSlot, claim: Claim
    ) -> tuple[list[Drift], int]:
        """See `Engine.evaluate`."""
        me, stride = self._grid.picard.place, self._grid.picard.size
        self._allocate(layout, -(-claim.slots // stride))
        mine: list[Drift] = []
        with self._stats.phase("drift"):
            for row, slot in zip(self._rows[me], range(me, claim.slots, stride), strict=False):
                mine.append(self._modules.evaluate(layout, partial(evaluate, slot, row)))
                check_sendable(mine[-1])
                if mine[-1].outcome >= self._stops_at:
                    break
        worst = max(mine, key=lambda drift: drift.outcome, default=None)
        with self._stats.phase("exchange"), self._leaving(worst.error if worst else None):
            return self._gather(layout, mine, claim)

    def average(self, layout: ParameterLayout, drift: Drift) -> Drift:
        """See `Engine.average`."""
        row = self._grid.data
        if row.size == 1:
            return drift
        with self._stats.phase("exchange"), self._leaving(drift.error):
            check_sendable(drift)
            message = pickle.dumps([pack(drift)])
            lengths = self._share_header(_FLAG, [len(message)], row)[:, 0]
            packs = self._share_bytes(message, lengths, row)
            parts = [
                drift if rank == self.rank else unpack(fields[0], drift.row, rank)
                for rank, fields in zip(row.names, packs, strict=True)
            ]
            if all(part.outcome < Outcome.FAILED for part in parts):
                self._average(layout, drift.row)
            return average_drifts(parts, drift.row)

    @property
    def _stops_at(self) -> Outcome:
        """At which outcome a rank leaves out its later slots.

        A data row must go on together: a collective in the closure (DistributedDataParallel's) would wait for a rank
        that stopped.
        """
        return Outcome.NONFINITE if self.data_size == 1 else Outcome.INTERRUPTED

    def agree(self, table: Tensor, columns: int) -> list[list[float]]:
        """Rank 0's numbers, cut to what every rank has; one rank decides, so that rounding never parts them."""
        with self._stats.phase("exchange"):
            count = table.shape[1]
            local = torch.zeros(
                1 + table.shape[0] * columns, dtype=torch.float64, device=table.device
            )
            local[0] = count
            local[1:].view(table.shape[0], columns)[:, :count] = table
            local = local.to(self._exchange.device)
            shared = torch.empty(
                (self.size, local.numel() * 8), dtype=torch.uint8, device=local.device
            )
            self._exchange.share(local.view(torch.uint8), shared, self._grid.everyone)
            numbers = shared.view(torch.float64).cpu()
            least = int(numbers[:, 0].min())
            told: list[list[float]] = (
                numbers[0, 1:].view(table.shape[0], columns)[:, :least].tolist()
            )
            return told

    def share_numbers(
        self, values: list[int], error: BaseException | None = None
    ) -> list[list[int]]:
        """Every rank's integers, by rank."""
        with self._stats.phase("exchange"), self._leaving(error):
            table = self._share_header(_FLAG, values)
            return [[int(x) for x in row[: len(values)]] for row in table]

    @contextmanager
    def _leaving(self, error: BaseException | None) -> Iterator[None]:
        """A rank that a signal ends (`error`) tells the others, but does not wait for them to listen.

        Another error is told where a rank is lost: perhaps that one waits for what the closure left out here.
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
        patience = self._exchange.timeout
        self._exchange.timeout = min(patience, _LAST_WORDS)
        try:
            yield
        except PicardError:
            raise error from None
        finally:
            self._exchange.timeout = patience

    def _allocate(self, layout: ParameterLayout, rounds: int) -> None:
        if layout is self._layout and rounds == len(self._rows[0]):
            return
        self._layout = layout
        shape = (self._grid.picard.size, rounds, layout.row_bytes)
        self._matrix = torch.zeros(shape, dtype=torch.uint8, device=layout.device)
        self._rows = [[layout.row(line) for line in lines] for lines in self._matrix]
        same_place = layout.device.type == self._exchange.device.type
        self._staging = None if same_place else torch.empty(shape, dtype=torch.uint8)

    def _gather(
        self, layout: ParameterLayout, mine: list[Drift], claim: Claim
    ) -> tuple[list[Drift], int]:
        message = pickle.dumps([pack(drift) for drift in mine])
        fatal = any(
            drift.outcome is Outcome.INTERRUPTED
            or (drift.outcome is Outcome.FAILED and drift.step == claim.step)
            for drift in mine
        )
        header = self._share_header(_SWEEP, [len(message), int(fatal), *claim.as_list()])
        lengths, fatalities = header[:, 0], header[:, 1]
        self._compare(header[:, 2:])
        packs = self._share_bytes(message, lengths)
        if not fatalities.any():
            self._share_rows(layout, len(mine))
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
        for slot in range(claim.slots):
            turn, place = divmod(slot, self._grid.picard.size)
            parts = [received[rank][turn : turn + 1] for rank in self._grid.table[place]]
            if all(parts):  # who stopped at a bad slot left out later ones: they lie behind it
                row = self._rows[place][turn]
                drifts.append(average_drifts([part for (part,) in parts], row))
        return usable_prefix(drifts), len(drifts)

    def _share_header(
        self, kind: int, values: list[int], circle: Circle | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The values of every rank (of a circle), int64 [ranks, _HEADER_LENGTH - 1]; the same size for every kind."""
        circle = circle or self._grid.everyone
        words = [kind, *values, *[0] * (_HEADER_LENGTH - 1 - len(values))]
        local = torch.tensor(words, dtype=torch.int64, device=self._exchange.device)
        shared = torch.empty((circle.size, 8 * len(words)), dtype=torch.uint8, device=local.device)
        self._exchange.share(local.view(torch.uint8), shared, circle)
        table: np.ndarray[Any, np.dtype[np.int64]] = shared.view(torch.int64).cpu().numpy()
        if (table[:, 0] != kind).any():
            told = ", ".join(
                f"rank {rank}: {_KINDS.get(k, k)}"
                for rank, k in zip(circle.names, table[:, 0], strict=True)
            )
            raise RankMismatchError(
                f"the ranks are in different places of the program ({told}): call step equally often, and "
                "change parameters or options on all ranks alike"
            )
        return table[:, 1:]

    def _share_bytes(
        self,
        message: bytes,
        lengths: np.ndarray[Any, np.dtype[np.int64]],
        circle: Circle | None = None,
    ) -> list[Any]:
        circle = circle or self._grid.everyone
        local = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        local[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        local = local.to(self._exchange.device)
        shared = torch.empty((circle.size, local.numel()), dtype=torch.uint8, device=local.device)
        self._exchange.share(local, shared, circle)
        rows = shared.cpu().numpy()
        return [
            pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    def _share_rows(self, layout: ParameterLayout, turns: int) -> None:
        me = self._grid.picard.place
        if self.data_size > 1:
            for row in self._rows[me][:turns]:
                self._average(layout, row)
        matrix = self._matrix if self._staging is None else self._staging
        if self._staging is not None:
            self._staging[me].copy_(self._matrix[me])
        flat = matrix.view(self._grid.picard.size, -1)
        self._exchange.share(flat[me], flat, self._grid.picard)
        if self._staging is not None:
            self._matrix.copy_(self._staging)

    def _compare(
        self, claims: np.ndarray[Any, np.dtype[np.int64]], ignore: tuple[str, ...] = ()
    ) -> None:
        for name, column in zip(Claim.names(), claims.T, strict=False):
            if name not in ignore and (column != column[0]).any():
                told = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(column))
                raise RankMismatchError(
                    f"the ranks disagree about {_MEANING[name]} ({told}): build the same model and optimizer on "
                    "every rank, call step equally often, and change parameters on all ranks alike"
                )


_KINDS = {_START: "construction", _SWEEP: "a sweep", _FLAG: "a check of the closure"}
_MEANING = {
    "step": "the step",
    "sweep": "the number of sweeps",
    "slots": "the number of slots",
    "window": "the window",
    "seed": "the seed",
    "options": "an option (tolerance, predictor, total_steps, nonfinite, audit)",
    "layout": "the parameters' shapes or dtypes",
    "parameters": "the parameters' values",
}
