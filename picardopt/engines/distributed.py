"""The ranks of a process group evaluate a window together: SPMD, every rank a worker.

A sweep: each rank evaluates its slots (slot j on rank j mod ranks), then the ranks exchange a fixed-size
header (what they computed, whether it went well), then everything else. A rank whose closure raised still
answers, so that all ranks raise the same error; payload sizes are only trusted after the headers agreed.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt.drift import Drift, Outcome, map_tensors
from picardopt.engines.base import Claim, EvaluateSlot, usable_prefix
from picardopt.engines.exchange import make_exchange
from picardopt.errors import RankMismatchError, RemoteClosureError
from picardopt.layout import ParameterLayout, Row
from picardopt.stats import Stats

_HEADER_LENGTH = 16  # int64 words of every header, whatever its kind
_START, _SWEEP, _FLAG = 0x70696361_01, 0x70696361_02, 0x70696361_03  # kinds of header


class DistributedEngine:
    """Evaluates slots on the ranks of a process group.

    Args:
        group: The Picard ranks.
        device: Where the parameters lie.
        timeout: Seconds that a rank is waited for.
        stats: Where the seconds go.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout: float, stats: Stats
    ) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._stats = group, stats
        self._exchange = make_exchange(group, device, timeout)
        self._layout: ParameterLayout | None = None
        self._matrix = torch.empty(0, dtype=torch.uint8)  # [ranks, rounds * row_bytes]
        self._staging: Tensor | None = None
        self._rows: list[list[Row]] = []  # [ranks][rounds]

    def start(self, layout: ParameterLayout, head: Row, claim: Claim) -> None:
        """Compares the ranks' claims, parameters apart, and gives all of them rank 0's parameters."""
        with self._stats.phase("exchange"):
            self._compare(self._share_header(_START, claim.as_list()), ignore=("parameters",))
            buffer = head.buffer.to(self._exchange.device)
            dist.broadcast(buffer, group=self._group, group_src=0)
            head.buffer.copy_(buffer)

    def evaluate(
        self, layout: ParameterLayout, evaluate: EvaluateSlot, claim: Claim
    ) -> tuple[list[Drift], int]:
        """See `Engine.evaluate`."""
        rounds = -(-claim.slots // self.size)
        self._allocate(layout, rounds)
        mine: list[Drift] = []
        with self._stats.phase("drift"):
            for turn, slot in enumerate(range(self.rank, claim.slots, self.size)):
                mine.append(evaluate(slot, self._rows[self.rank][turn]))
                _check_sendable(mine[-1])
                if mine[-1].outcome is not Outcome.FINITE:
                    break
        with self._stats.phase("exchange"):
            return self._gather(mine, claim)

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
            self._exchange.share(local.view(torch.uint8), shared)
            numbers = shared.view(torch.float64).cpu()
            least = int(numbers[:, 0].min())
            told: list[list[float]] = (
                numbers[0, 1:].view(table.shape[0], columns)[:, :least].tolist()
            )
            return told

    def share_numbers(self, values: list[int]) -> list[list[int]]:
        """Every rank's integers, by rank."""
        with self._stats.phase("exchange"):
            table = self._share_header(_FLAG, values)
            return [[int(x) for x in row[: len(values)]] for row in table]

    def _allocate(self, layout: ParameterLayout, rounds: int) -> None:
        if layout is self._layout and rounds == len(self._rows[0]):
            return
        self._layout = layout
        shape = (self.size, rounds, layout.row_bytes)
        self._matrix = torch.zeros(shape, dtype=torch.uint8, device=layout.device)
        self._rows = [
            [layout.row(self._matrix[rank, turn]) for turn in range(rounds)]
            for rank in range(self.size)
        ]
        same_place = layout.device.type == self._exchange.device.type
        self._staging = None if same_place else torch.empty(shape, dtype=torch.uint8)

    def _gather(self, mine: list[Drift], claim: Claim) -> tuple[list[Drift], int]:
        message = pickle.dumps([_pack(drift) for drift in mine])
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
            self._share_rows()
        drifts: list[Drift | None] = [None] * claim.slots
        for rank, pack in enumerate(packs):
            for turn, fields in enumerate(pack):
                drift = mine[turn] if rank == self.rank else self._unpack(fields, rank, turn)
                if drift.outcome is Outcome.INTERRUPTED and drift.error is not None:
                    raise drift.error
                drifts[drift.step - claim.step] = drift
        # A rank that stopped at a bad slot leaves its later ones None: they lie behind that slot.
        present = [drift for drift in drifts if drift is not None]
        return usable_prefix(present), len(present)

    def _share_header(self, kind: int, values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Every rank's values, int64 [ranks, _HEADER_LENGTH - 1]; the same size whatever the kind."""
        words = [kind, *values, *[0] * (_HEADER_LENGTH - 1 - len(values))]
        local = torch.tensor(words, dtype=torch.int64, device=self._exchange.device)
        shared = torch.empty((self.size, 8 * len(words)), dtype=torch.uint8, device=local.device)
        self._exchange.share(local.view(torch.uint8), shared)
        table: np.ndarray[Any, np.dtype[np.int64]] = shared.view(torch.int64).cpu().numpy()
        if (table[:, 0] != kind).any():
            told = ", ".join(
                f"rank {rank}: {_KINDS.get(k, k)}" for rank, k in enumerate(table[:, 0])
            )
            raise RankMismatchError(
                f"the ranks are in different places of the program ({told}): call step equally often, and "
                "change parameters or options on all ranks alike"
            )
        return table[:, 1:]

    def _share_bytes(
        self, message: bytes, lengths: np.ndarray[Any, np.dtype[np.int64]]
    ) -> list[Any]:
        local = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        local[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        local = local.to(self._exchange.device)
        shared = torch.empty((self.size, local.numel()), dtype=torch.uint8, device=local.device)
        self._exchange.share(local, shared)
        rows = shared.cpu().numpy()
        return [
            pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    def _share_rows(self) -> None:
        matrix = self._matrix if self._staging is None else self._staging
        if self._staging is not None:
            self._staging[self.rank].copy_(self._matrix[self.rank])
        flat = matrix.view(self.size, -1)
        self._exchange.share(flat[self.rank], flat)
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

    def _unpack(self, fields: dict[str, Any], rank: int, turn: int) -> Drift:
        fields = dict(fields)
        device, error = fields.pop("loss_device"), fields["error"]
        if device != "cpu" and self._layout is not None:
            place = self._layout.device
            fields["loss"] = map_tensors(lambda t: t.to(place), fields["loss"])
        drift = Drift(row=self._rows[rank][turn], **fields)
        if drift.outcome >= Outcome.FAILED:
            drift.error = _unpack_error(error)
            drift.error.add_note(f"raised by the closure on rank {rank}:\n{drift.trace}")
        return drift


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


def _pack(drift: Drift) -> dict[str, Any]:
    devices: list[str] = ["cpu"]

    def to_host(tensor: Tensor) -> Tensor:
        devices.append(tensor.device.type)
        return tensor.cpu()

    return {
        "step": drift.step,
        "present": drift.present,
        "loss": map_tensors(to_host, drift.loss),
        "loss_device": devices[-1],
        "rng": drift.rng,
        "outcome": drift.outcome,
        "error": _pack_error(drift.error),
        "trace": drift.trace,
    }


def _check_sendable(drift: Drift) -> None:
    """Turns a drift whose loss cannot be sent to the other ranks into a failed one."""
    if isinstance(drift.loss, Tensor | float | int | None):
        return
    try:
        pickle.dumps(drift.loss)
    except Exception as error:
        drift.outcome = Outcome.FAILED
        drift.error = TypeError(
            f"the closure returned a {type(drift.loss).__name__} that cannot be pickled for the other ranks "
            f"({error}): return the loss as a tensor or a number"
        )
        drift.loss = None


def _pack_error(error: BaseException | None) -> bytes | str | None:
    """Pickles an exception, or describes it where that cannot be undone on another rank."""
    if error is None:
        return None
    try:
        packed = pickle.dumps(error)
        if isinstance(pickle.loads(packed), BaseException):
            return packed
    except Exception:  # anything can go wrong in a foreign exception's __reduce__
        pass
    return f"{type(error).__name__}: {error}"


def _unpack_error(packed: bytes | str | None) -> BaseException:
    if isinstance(packed, bytes):
        error: BaseException = pickle.loads(packed)
        return error
    return RemoteClosureError(packed or "unknown error")
