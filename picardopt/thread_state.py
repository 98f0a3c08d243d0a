"""What torch keeps by thread, and a thread that works for another one must take over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from picardopt.compat import accelerator, accelerator_module


@dataclass(frozen=True)
class ThreadState:
    """The settings of one thread, as `torch.nn.parallel.parallel_apply` takes them over, and the default device.

    Attributes:
        grad: Whether gradients are recorded.
        autocast: By device type, whether autocast is on, and its dtype.
        stream: The accelerator's current stream, with its device; None without an accelerator in use.
        default_device: Where new tensors are made.
    """

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    stream: Any
    default_device: torch.device

    @classmethod
    def capture(cls) -> ThreadState:
        """Reads the settings of the calling thread."""
        kinds, stream = ["cpu"], None
        device, module = accelerator(), accelerator_module()
        if device is not None and module is not None:
            kinds.append(device.type)
            used = getattr(module, "is_initialized", lambda: True)()
            if used and hasattr(module, "set_stream"):  # MPS has one stream
                stream = module.current_stream()
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
        )
        return cls(torch.is_grad_enabled(), autocast, stream, torch.get_default_device())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the calling thread these settings inside the block."""
        before = ThreadState.capture()
        changed = self.default_device != before.default_device
        try:
            self._set()
            with self.default_device if changed else nullcontext():
                yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if self.stream is not None:
            torch.get_device_module(self.stream.device).set_stream(self.stream)
