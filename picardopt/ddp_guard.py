"""Refuses modules that average gradients over ranks that evaluate different steps."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from picardopt.audit.modules import live_modules, uses_compile
from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.errors import UnsupportedOptimizerError
from picardopt.layout import ParameterLayout, Row
from picardopt.ranks import MESH_EXAMPLE, RankGroup


class DdpGuard:
    """Refuses closures that call DistributedDataParallel or FSDP modules across ranks that evaluate other slots.

    DistributedDataParallel averages gradients inside ``backward``. Across ranks that evaluate different steps it
    would silently mix these steps. Modules are checked until one evaluation has succeeded.

    Args:
        data: This process's data row; None if it is alone.
    """

    def __init__(self, data: RankGroup | None) -> None:
        self._row = _global_ranks(data)
        self._passed = not (dist.is_available() and dist.is_initialized())

    def wrap(self, layout: ParameterLayout, evaluate: EvaluateSlot) -> EvaluateSlot:
        """Returns an evaluation that checks modules before they run, until one was finite."""
        return lambda slot, row: self._evaluate(layout, evaluate, slot, row)

    def _evaluate(
        self, layout: ParameterLayout, evaluate: EvaluateSlot, slot: int, row: Row
    ) -> Drift:
        if self._passed:
            return evaluate(slot, row)
        if (
            uses_compile()
        ):  # a hook would cause recompilation: check the modules that hold a parameter
            own = {id(parameter) for parameter in layout.parameters}
            for module in (part for root in live_modules() for part in root.modules()):
                if any(id(parameter) in own for parameter in module.parameters()):
                    self._check(module, ())
            self._passed = True
            return evaluate(slot, row)
        handle = register_module_forward_pre_hook(self._check)
        try:
            drift = evaluate(slot, row)
        finally:
            handle.remove()
        self._passed = drift.outcome is Outcome.FINITE
        return drift

    def _check(self, module: torch.nn.Module, args: Any) -> None:
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
                f"mesh = {MESH_EXAMPLE}, wrap with "
                'DistributedDataParallel(module, process_group=mesh.get_group("data")) and give the optimizer mesh=mesh'
            )


def _global_ranks(ranks: RankGroup | None) -> list[int]:
    if ranks is not None:
        return [dist.get_global_rank(ranks.group, peer) for peer in ranks.peers]
    alone = dist.is_available() and dist.is_initialized()
    return [dist.get_rank()] if alone else [0]
