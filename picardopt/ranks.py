"""Which ranks share a window, and which of them share a slot: the grid of Picard ranks and data ranks.

The ranks of a data row evaluate the same slots, each on its part of the batch, and average their drifts. The ranks of
a column are the Picard ranks: they evaluate different slots.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

DIMS = ("picard", "data")
MESH_EXAMPLE = 'init_device_mesh("cuda", (picard, data), mesh_dim_names=("picard", "data"))'


@dataclass(frozen=True)
class RankGroup:
    """Ranks that exchange messages.

    Attributes:
        group: A process group that holds them.
        peers: Their ranks in that process group, in the order of their messages.
        labels: Their ranks among all ranks of the optimizer, as printed in errors.
        rank: This process's index among the peers.
    """

    group: dist.ProcessGroup
    peers: tuple[int, ...]
    labels: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.peers)


@dataclass(frozen=True)
class RankGrid:
    """The ranks of one optimizer.

    Attributes:
        everyone: All of them, in the order of their group.
        picard: Those that evaluate other slots on the same part of the batch, by Picard rank.
        data: Those that evaluate the same slots on other parts of the batch, by data rank.
        table: Ranks in `everyone`, [Picard rank][data rank].
    """

    everyone: RankGroup
    picard: RankGroup
    data: RankGroup
    table: tuple[tuple[int, ...], ...]


def make_grid(
    process_group: dist.ProcessGroup | DeviceMesh | None, mesh: DeviceMesh | None
) -> RankGrid | None:
    """Returns the ranks of the arguments; by default those of torch's default group.

    Every rank of a mesh must call it: for a mesh of several dims over a part of the default group it creates a process
    group.

    Returns:
        The grid, or None if this process is alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If both arguments are given, or a mesh has dims other than "picard" and "data".
        RuntimeError: If there are several processes, but no process group.
    """
    if mesh is not None and process_group is not None:
        raise ValueError(
            "mesh and process_group are both given: give mesh alone; its ranks share the window"
        )
    if mesh is not None:
        grid = _grid_of_mesh(mesh)
    else:
        group = _resolve_group(process_group)
        if group is None:
            return None
        everyone = _rank_group(group)
        table = tuple((rank,) for rank in everyone.peers)
        grid = RankGrid(everyone, everyone, _alone(everyone), table)
    return grid if grid.everyone.size > 1 else None


def _grid_of_mesh(mesh: DeviceMesh) -> RankGrid:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh={mesh!r}: give a DeviceMesh, such as {MESH_EXAMPLE}")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMS):
        raise ValueError(
            f'mesh={mesh!r}: its dims must be called "picard" and "data" (or be one of them), such as '
            f'{MESH_EXAMPLE}; of a larger mesh take mesh["picard", "data"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh={mesh!r}: this process, rank {dist.get_rank()}, is not in it")
    ranks = mesh.mesh.cpu()  # global ranks, shaped like the mesh
    if names == ("data", "picard"):
        ranks = ranks.T
    rows: list[list[int]] = ranks.reshape(-1, ranks.shape[-1] if "data" in names else 1).tolist()
    everyone = _rank_group(_whole_group(mesh, ranks.numel()))
    table = tuple(tuple(dist.get_group_rank(everyone.group, r) for r in row) for row in rows)
    mine = next(row for row in table if everyone.rank in row)
    column = tuple(row[mine.index(everyone.rank)] for row in table)
    picard, data = (
        _rank_group(mesh.get_group(name), everyone, members) if name in names else _alone(everyone)
        for name, members in (("picard", column), ("data", mine))
    )
    return RankGrid(everyone, picard, data, table)


def _whole_group(mesh: DeviceMesh, size: int) -> dist.ProcessGroup:
    """Returns a group over all ranks of a mesh; creates one only if no dim and not the default group is that."""
    for dim in range(mesh.ndim):
        if mesh.size(dim) == size:
            return mesh.get_group(dim)
    if dist.group.WORLD is not None and size == dist.get_world_size():
        return dist.group.WORLD
    ranks = mesh.mesh.flatten().tolist()
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group


def _rank_group(
    group: dist.ProcessGroup, everyone: RankGroup | None = None, labels: tuple[int, ...] = ()
) -> RankGroup:
    """Returns all ranks of a process group, or those of `everyone` with the given labels, in the order given."""
    if everyone is None:
        ranks = tuple(range(dist.get_world_size(group)))
        return RankGroup(group, ranks, ranks, dist.get_rank(group))
    members = [dist.get_global_rank(everyone.group, label) for label in labels]
    peers = tuple(dist.get_group_rank(group, rank) for rank in members)
    return RankGroup(group, peers, labels, labels.index(everyone.rank))


def _alone(everyone: RankGroup) -> RankGroup:
    """Returns the group of this process alone."""
    rank = everyone.peers[everyone.rank]
    return RankGroup(everyone.group, (rank,), (rank,), 0)


def _resolve_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """Returns the process group to use; never creates one."""
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
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} but torch.distributed is not initialized: call "
            "picardopt.init_process_group() first, or every process would train on its own"
        )
    return None
