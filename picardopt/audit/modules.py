"""Finds the modules that a closure may call, without global hooks if torch.compile is in use."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def uses_compile() -> bool:
    """Returns whether torch.compile was used in this process.

    Compiled code is guarded on the global module hooks: a hook that comes and goes would make torch recompile again and
    again, until it gives up.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    backends: dict[int, Any] = getattr(dynamo, "cached_backends", {})
    return any(backend is not None for backend in backends.values())


def live_modules() -> list[torch.nn.Module]:
    """Returns the modules of this process that are not part of another one (takes about 0.1 s)."""
    modules = [obj for obj in gc.get_objects() if issubclass(type(obj), torch.nn.Module)]
    modules = [
        module for module in modules if "_modules" in vars(module)
    ]  # its constructor has run
    modules = [module for module in modules if not _is_compilers(module)]
    parts = {id(child) for module in modules for child in module.children()}
    return [module for module in modules if id(module) not in parts]


def any_ddp() -> bool:
    """Returns whether this process has a DistributedDataParallel module over several ranks (takes about 0.1 s)."""
    return any(
        isinstance(part, DistributedDataParallel)
        and len(dist.get_process_group_ranks(part.process_group)) > 1
        for root in live_modules()
        for part in root.modules()
    )


def _is_compilers(module: torch.nn.Module) -> bool:
    """Returns whether torch.compile made this module, or its buffers hold no data."""
    made = type(module).__name__ == "OptimizedModule" or isinstance(module, torch.fx.GraphModule)
    return made or any(b.is_meta or type(b).__name__ == "FakeTensor" for b in module.buffers())
