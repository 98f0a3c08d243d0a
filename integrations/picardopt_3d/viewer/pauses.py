"""A pause of all workers after the same step, so that none waits for another's numbers until its patience ends."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOK = 0.05
"""Seconds between two looks of a worker that waits."""


def shared_store() -> Store | None:
    """Returns a part of the workers' key-value store that nothing else uses; all of them call this.

    None if there is one worker.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    return PrefixStore(name[0], _get_default_store())


class Pauses:
    """The pauses of one stage.

    The first worker asks for one. The others may be ahead of it, by at most what is left of the present sweep: the next
    sweep needs the first worker too. So the pause begins a window of steps later, when every worker has heard of it.

    Args:
        store: The workers' store; None: there is one worker.
        stage: Index of the stage.
        window: Steps that a sweep can make final.
    """

    def __init__(self, store: Store | None, stage: int, window: int) -> None:
        self._store, self._stage, self._window = store, stage, window
        self._number = 0
        self._at: int | None = None

    def begins(self, taken: int) -> bool:
        """Asks for a pause, if none is asked for, and returns whether it begins now; for the first worker.

        Args:
            taken: Steps taken.
        """
        if self._at is None:
            self._at = taken if self._store is None else taken + self._window
            self._set("begins", str(self._at))
        return taken >= self._at

    def end(self) -> None:
        """Ends a pause that was asked for, if there is one; for the first worker."""
        if self._at is not None:
            self._set("ended", "")
            self._at, self._number = None, self._number + 1

    def join(self, taken: int) -> None:
        """Waits while there is a pause after this many steps; for the other workers."""
        store = self._store
        if store is None:
            return
        while store.check([self._key("begins")]) and taken >= int(store.get(self._key("begins"))):
            while not store.check([self._key("ended")]):
                time.sleep(_LOOK)
            self._number += 1

    def _key(self, name: str) -> str:
        return f"{self._stage}/{self._number}/{name}"

    def _set(self, name: str, value: str) -> None:
        if self._store is not None:
            self._store.set(self._key(name), value)
