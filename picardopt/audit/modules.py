"""Which modules a closure may call: found without global hooks where torch.compile is in use."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch


def uses_compile() -> bool:
    """Whether torch.compile was used in this process.

    What it compiles is guarded by the global module hooks: one that comes and goes would make it compile anew, again
    and again, until it gives up.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    backends: dict[int, Any] = getattr(dynamo, "cached_backends", {})
    return any(backend is not None for backend in backends.values())


def live_modules() -> list[torch.nn.Module]:
    """The modules of this process that are no part of another one (some 0.1 s)."""
    modules = [obj for obj in gc.get_objects() if issubclass(type(obj), torch.nn.Module)]
    modules = [
        module for module in modules if "_modules" in vars(module)
    ]  # its constructor has run
    modules = [module for module in modules if not _is_compilers(module)]
    parts = {id(child) for module in modules for child in module.children()}
    return [module for module in modules if id(module) not in parts]


def _is_compilers(module: torch.nn.Module) -> bool:
    """Whether a module was made by torch.compile, or holds no data."""
    made = type(module).__name__ == "OptimizedModule" or isinstance(module, torch.fx.GraphModule)
    return made or any(b.is_meta or type(b).__name__ == "FakeTensor" for b in module.buffers())
