"""Which ranks share a window, and which of them share a slot: the grid of Picard ranks and data ranks.

Ranks of one data row evaluate the same slots, each on its part of the batch, and average their drifts;
splitting a batch is exact and comes first. Ranks of one column are the Picard ranks: they evaluate
different slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from picardopt.drift import Drift, Outcome
from picardopt.errors import UnsupportedOptimizerError
from picardopt.layout import ParameterLayout
from picardopt.modules import live_modules, uses_compile

DIMS = ("picard", "data")
_MESH = 'init_device_mesh("cuda", (picard, data), mesh_dim_names=("picard", "data"))'


@dataclass(frozen=True)
class Circle:
    """Ranks that tell each other something.

    Attributes:
        group: A process group that holds them.
        peers: Their ranks in it, in the order in which their messages are kept.
        names: What errors call them: their ranks among all ranks of the optimizer.
        place: This process's index among the peers.
    """

    group: dist.ProcessGroup
    peers: tuple[int, ...]
    names: tuple[int, ...]
    place: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.peers)


@dataclass(frozen=True)
class Grid:
    """The ranks of one optimizer.

    Attributes:
        everyone: All of them, in the order of their group.
        picard: Those that evaluate other slots on the same part of the batch, by Picard rank.
        data: Those that evaluate the same slots on other parts of the batch, by data rank.
        table: Ranks in `everyone`, [Picard rank][data rank].
    """

    everyone: Circle
    picard: Circle
    data: Circle
    table: tuple[tuple[int, ...], ...]


def make_grid(
    process_group: dist.ProcessGroup | DeviceMesh | None, mesh: DeviceMesh | None
) -> Grid | None:
    """The ranks that the arguments name, torch's default group if they name none.

    Every rank of a mesh must call it: a mesh of several dims over a part of the default group gets a group of
    its own here.

    Returns:
        The grid, or None where this process is alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If both are given, or a mesh has other dims than "picard" and "data".
        RuntimeError: If there are several processes, but no process group.
    """
    if mesh is not None and process_group is not None:
        raise ValueError(
            "mesh and process_group are both given: give mesh alone, its ranks share the window"
        )
    if mesh is not None:
        grid = _grid_of_mesh(mesh)
    else:
        group = _resolve_group(process_group)
        if group is None:
            return None
        everyone = _circle(group)
        table = tuple((rank,) for rank in everyone.peers)
        grid = Grid(everyone, everyone, _alone(everyone), table)
    return grid if grid.everyone.size > 1 else None


def _grid_of_mesh(mesh: DeviceMesh) -> Grid:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh={mesh!r}: give a DeviceMesh, such as {_MESH}")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMS):
        raise ValueError(
            f'mesh={mesh!r}: its dims must be called "picard" and "data" (or be one of them), such as {_MESH}; of a '
            'larger mesh take mesh["picard", "data"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh={mesh!r}: this process, rank {dist.get_rank()}, is not in it")
    ranks = mesh.mesh.cpu()  # global ranks, shaped like the mesh
    if names == ("data", "picard"):
        ranks = ranks.T
    rows: list[list[int]] = ranks.reshape(-1, ranks.shape[-1] if "data" in names else 1).tolist()
    everyone = _circle(_whole_group(mesh, ranks.numel()))
    table = tuple(tuple(dist.get_group_rank(everyone.group, r) for r in row) for row in rows)
    mine = next(row for row in table if everyone.place in row)
    column = tuple(row[mine.index(everyone.place)] for row in table)
    picard, data = (
        _circle(mesh.get_group(name), everyone, members) if name in names else _alone(everyone)
        for name, members in (("picard", column), ("data", mine))
    )
    return Grid(everyone, picard, data, table)


def _whole_group(mesh: DeviceMesh, size: int) -> dist.ProcessGroup:
    """A group over all ranks of a mesh; made only where neither a dim nor the default group is that."""
    for dim in range(mesh.ndim):
        if mesh.size(dim) == size:
            return mesh.get_group(dim)
    if dist.group.WORLD is not None and size == dist.get_world_size():
        return dist.group.WORLD
    ranks = mesh.mesh.flatten().tolist()
    made: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return made


def _circle(
    group: dist.ProcessGroup, everyone: Circle | None = None, names: tuple[int, ...] = ()
) -> Circle:
    """All of a group in its own order, or some of everyone in a given order, through a group that holds them."""
    if everyone is None:
        ranks = tuple(range(dist.get_world_size(group)))
        return Circle(group, ranks, ranks, dist.get_rank(group))
    members = [dist.get_global_rank(everyone.group, name) for name in names]
    peers = tuple(dist.get_group_rank(group, rank) for rank in members)
    return Circle(group, peers, names, names.index(everyone.place))


def _alone(everyone: Circle) -> Circle:
    """This process by itself."""
    rank = everyone.peers[everyone.place]
    return Circle(everyone.group, (rank,), (rank,), 0)


def _resolve_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group to use; never creates one."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"process_group={group!r}: give a one-dimensional mesh or a ProcessGroup, or give mesh="
            )
        return group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group={group!r}: give a ProcessGroup, a DeviceMesh or None")
    if group is not None:
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} but torch.distributed is not initialised: call "
            "picardopt.init_process_group() first, or every process would train on its own"
        )
    return None


class ForeignModules:
    """Refuses closures whose modules talk to ranks that evaluate something else; looks once.

    DistributedDataParallel averages gradients inside ``backward``. Over ranks that evaluate different steps that
    would mix these steps, without an error.

    Args:
        data: This process's data row; None where it is alone.
    """

    def __init__(self, data: Circle | None) -> None:
        self._row = _global_ranks(data)
        self._passed = not (dist.is_available() and dist.is_initialized())  # then none is foreign

    def evaluate(self, layout: ParameterLayout, evaluate: Callable[[], Drift]) -> Drift:
        """Evaluates a drift; until one was finite, modules are looked at before they run."""
        if self._passed:
            return evaluate()
        if (
            uses_compile()
        ):  # a hook would make it compile anew, and warn: look at those that hold a parameter
            own = {id(parameter) for parameter in layout.parameters}
            for module in (part for root in live_modules() for part in root.modules()):
                if any(id(parameter) in own for parameter in module.parameters()):
                    self._look(module, ())
            self._passed = True
            return evaluate()
        handle = register_module_forward_pre_hook(self._look)
        try:
            drift = evaluate()
        finally:
            handle.remove()
        self._passed = drift.outcome is Outcome.FINITE
        return drift

    def _look(self, module: torch.nn.Module, args: Any) -> None:
        sharded = any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)
        if not sharded and not isinstance(module, DistributedDataParallel):
            return
        ranks = dist.get_process_group_ranks(cast(dist.ProcessGroup, module.process_group))
        if len(ranks) < 2:
            return
        if sharded:
            raise UnsupportedOptimizerError(
                "the closure calls a FullyShardedDataParallel module: each rank holds a shard of the parameters there, "
                "but running ahead needs whole iterates on every rank; use DistributedDataParallel with mesh="
            )
        if sorted(ranks) != sorted(self._row):
            raise ValueError(
                f"the closure calls a DistributedDataParallel module over ranks {ranks}, which averages gradients of "
                f"different steps: this rank shares its slots with ranks {self._row} only. Build "
                f'mesh = {_MESH}, wrap with DistributedDataParallel(module, process_group=mesh.get_group("data")) '
                "and give the optimizer mesh=mesh"
            )


def _global_ranks(circle: Circle | None) -> list[int]:
    if circle is not None:
        return [dist.get_global_rank(circle.group, rank) for rank in circle.peers]
    alone = dist.is_available() and dist.is_initialized()
    return [dist.get_rank()] if alone else [0]
