"""Which devices there are."""

from __future__ import annotations

import os
import platform

from picardopt_3d.doctor.finding import Finding, first_line


def devices() -> list[Finding]:
    """Returns the CPU, each accelerator, and how many processes they can run."""
    import torch

    from picardopt.compat import accelerator

    cores = len(os.sched_getaffinity(0))
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    cpu = f"{cores} core(s), {_gib(free)} of {_gib(total)} GiB free; {platform.machine()}"
    found = [Finding("ok", "cpu", f"{cpu}; backend {_backend('cpu')}")]
    kind = accelerator()
    count = torch.get_device_module(kind).device_count() if kind else 0
    if kind is not None:
        found += [_accelerator(kind.type, index) for index in range(count)]
    if not count:
        why = "built without CUDA or ROCm" if not torch.backends.cuda.is_built() else "no driver"
        found.append(Finding("absent", "accelerator", f"none that this torch sees ({why})"))
    processes = count or cores
    hint = "one a device" if count else "one a core; their speed is not that of devices"
    detail = f"torchrun --nproc-per-node {processes} at most: {hint}"
    return [*found, Finding("ok", "processes", detail)]


def _accelerator(kind: str, index: int) -> Finding:
    """Name and free memory of one accelerator."""
    import torch

    name = f"{kind}:{index}"
    try:
        module = getattr(torch, kind)
        title = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
        memory = "memory unknown"
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(index)
            memory = f"{_gib(free)} of {_gib(total)} GiB free"
    except Exception as error:  # a driver that is there and does not work
        return Finding("broken", name, f"does not answer: {first_line(error)}")
    return Finding("ok", name, f"{title}, {memory}; backend {_backend(kind)}")


def _backend(kind: str) -> str:
    """What joins processes on such devices."""
    import torch.distributed as dist

    if not dist.is_available():
        return "none: this torch has no torch.distributed"
    backend = dist.Backend.default_device_backend_map.get(kind)
    if backend is None or not dist.is_backend_available(backend):
        return "none in this torch: one process only"
    return backend


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
