"""One stream of randomness per step, whatever the worker (law "same draw").

The paper seeds step t with ``t`` (or ``t + s``; supplement C, "Eliminating stochasticity"). Here the
seed is a 64-bit hash of (seed, t), so that seed 1 is not seed 0 shifted by one step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from picardopt.compat import accelerator_module
from picardopt.numpy_rng import NUMPY, NumpyState, equal_states


def step_seed(seed: int, step: int) -> int:
    """Hashes (seed, step) to an unsigned 64-bit integer."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8, person=b"picardopt").digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class RngState:
    """States of the generators that a step may draw from, on this rank."""

    cpu: Tensor
    accelerator: Tensor | None
    numpy: NumpyState
    python: tuple[Any, ...]

    @classmethod
    def capture(cls) -> RngState:
        """Reads the global generators; draws nothing."""
        module = _live_accelerator()
        return cls(
            cpu=torch.default_generator.get_state(),
            accelerator=None if module is None else module.get_rng_state(),
            numpy=NUMPY.state(),
            python=random.getstate(),
        )

    def same(self, other: RngState) -> bool:
        """Returns whether these are the same states, of the generators that both have read."""
        seen = self.accelerator is not None and other.accelerator is not None
        return (
            torch.equal(self.cpu, other.cpu)
            and (not seen or torch.equal(self.accelerator, other.accelerator))  # type: ignore[arg-type]
            and equal_states(self.numpy, other.numpy)
            and self.python == other.python
        )

    def restore(self) -> None:
        """Restores the global generators to this state."""
        torch.default_generator.set_state(self.cpu)
        module = _live_accelerator()
        if module is not None and self.accelerator is not None:
            module.set_rng_state(self.accelerator)
        NUMPY.restore(self.numpy)
        random.setstate(self.python)


def seed_all(value: int) -> None:
    """Seeds torch CPU, this rank's accelerator, numpy and random with one 64-bit value."""
    torch.default_generator.manual_seed(value)
    module = accelerator_module()
    if module is not None:
        # The device module's own function seeds the current device only, and lazily before its context is made.
        module.manual_seed(value)
    NUMPY.restore((value & 0xFFFFFFFF, value >> 32))
    random.seed(value)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the global generators on exit."""
    before = RngState.capture()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def step_rng(seed: int, step: int) -> Iterator[None]:
    """Runs a block under the randomness of one step.

    A parallel run at tolerance 0 is bitwise equal to this sequential loop::

        for step in range(total_steps):
            with step_rng(seed, step):
                loss = closure(step)
                base.step()

    Args:
        seed: The run's seed, any integer.
        step: Index of the optimizer step.

    Yields:
        Nothing; torch's CPU generator, the current accelerator's, numpy's and random's are seeded
        inside the block and restored afterwards. Generators of your own are not touched.
    """
    with preserved_rng():
        seed_all(step_seed(seed, step))
        yield


def _live_accelerator() -> Any | None:
    """Returns the accelerator's module if it holds a context; reading a state must not create one."""
    module = accelerator_module()
    initialized = getattr(module, "is_initialized", None)
    return module if initialized is None or initialized() else None
