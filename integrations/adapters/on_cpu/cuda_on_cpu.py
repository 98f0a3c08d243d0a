"""Runs code that names CUDA devices on the CPU: for trials of other people's code where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class CudaOnCpu(TorchFunctionMode):
    """Puts the CPU in the place of every CUDA device that a call of torch names."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the function."""
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(
                _on_cpu(arg) if isinstance(arg, str | torch.device) else arg for arg in args
            )
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    """Returns the CPU for a CUDA device, also for one that is named by its number."""
    named = isinstance(device, int) or str(device).startswith("cuda")
    return torch.device("cpu") if named else device


class Event:
    """Stands for `torch.cuda.Event`: measures nothing."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        """Does nothing."""

    def elapsed_time(self, other: Event) -> float:
        """Returns 0."""
        return 0.0


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Puts the CPU in the place of CUDA devices inside the block, on this thread."""
    nothing = mock.DEFAULT
    with contextlib.ExitStack() as stack:
        names = ("synchronize", "empty_cache", "manual_seed", "set_device")
        stack.enter_context(mock.patch.multiple(torch.cuda, **dict.fromkeys(names, nothing)))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        stack.enter_context(
            mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext())
        )
        stack.enter_context(CudaOnCpu())
        yield
