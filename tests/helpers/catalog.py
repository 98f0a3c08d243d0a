"""Every optimizer and learning-rate scheduler that the tests run, by name.

Torch's own come from torch's database of optimizers with its option samples; beside them stand some of our
own with state in unusual places (OWN) and in places out of reach (HIDDEN). Published ones: ``third_party``.
"""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler as schedulers
from torch.utils.weak import WeakTensorKeyDictionary

UNSUPPORTED = ("LBFGS", "SparseAdam")


@functools.cache
def torch_optimizers() -> dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]]:
    """Torch's samples (amsgrad, nesterov, ...), each plain, foreach and fused where it can be."""
    # Imported here: it takes seconds, and workers do not need it.
    from torch.testing._internal.common_optimizers import (
        _get_optim_inputs_including_global_cliquey_kwargs,
        optim_db,
    )

    found = {}
    for info in optim_db:
        name = info.optim_cls.__name__
        if name in UNSUPPORTED:
            continue
        for sample in _get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", None, info, skip=("differentiable", "foreach")
        ):
            found[f"{name}: {sample.desc}"] = (info.optim_cls, sample.kwargs)
            # The database runs foreach on accelerators only, but it is legal and different here.
            if "foreach" in info.supported_impls and not sample.kwargs.get("fused"):
                options = {**copy.deepcopy(sample.kwargs), "foreach": True}
                found[f"{name}: {sample.desc} & foreach"] = (info.optim_cls, options)
    return found


class Jumpy(torch.optim.Optimizer):
    """A nonlinear, discontinuous and non-invertible step over integer-valued parameters."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1.0, modulus: int = 97, branch: int = 3
    ) -> None:
        super().__init__(params, {"lr": lr, "modulus": modulus, "branch": branch})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            modulus, branch = group["modulus"], group["branch"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.copy_(torch.floor(momentum / 2) + torch.round(p.grad))
                jump = (p.long() % branch == 0).to(p.dtype)
                moved = p - momentum * (1 + jump) - jump * torch.sign(p)
                p.copy_(torch.fmod(moved, modulus))
        return loss


class Attribute(torch.optim.Optimizer):
    """Keeps its step count and velocity on itself and a counter in its groups, not in ``state``."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})
        self.count = 0
        self.velocity: dict[int, torch.Tensor] = {}
        self.norms = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self.count += 1
        index = 0
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                index += 1
                if p.grad is None:
                    continue
                velocity = self.velocity.setdefault(index, torch.zeros_like(p))
                velocity.mul_(1 - 1 / (self.count + 2)).add_(p.grad, alpha=1 / group["calls"])
                self.norms.add_(velocity.norm() * 1e-3)
                p.add_(velocity / (1 + self.norms), alpha=-group["lr"])
        return loss


class Overwriting(torch.optim.SGD):
    """Overwrites ``.grad`` in its step, as several published optimizers do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5).add_(p.detach().sign(), alpha=0.01)
        return super().step(closure)


class Langevin(torch.optim.Optimizer):
    """SGLD: draws from the global torch generator in its step."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
                    p.add_(torch.randn_like(p), alpha=group["lr"] * 0.1)
        return loss


class Nested(torch.optim.Optimizer):
    """Lookahead around an inner optimizer held in an attribute, with slow weights beside it."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.Adam(self.param_groups, lr=lr)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self.inner.step()
        self.calls += 1
        if self.calls % 3 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, fast, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Generators(torch.optim.SGD):
    """Draws from generators of its own, one of each library's kinds, kept in attributes."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = {"new": np.random.default_rng(2), "old": np.random.RandomState(3)}
        self.python = [random.Random(4)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        noise = self.numpy["new"].normal() + self.numpy["old"].normal() + self.python[0].random()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(torch.randn(p.shape, generator=self.torch), alpha=0.1 * noise)
        return super().step(closure)


class Weak(torch.optim.SGD):
    """Keeps its velocity beside ``state``, under weak references, and its step count in a numpy array."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.velocity: Any = WeakTensorKeyDictionary()
        self.count = np.zeros(1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(float(self.count[0]))
                    p.grad.add_(self.velocity.get(p, torch.zeros(())), alpha=0.5)
                    self.velocity[p] = p.grad.clone()
        return super().step(closure)


class Ticking(torch.optim.SGD):
    """Scales its steps by a count that `tick` keeps where no snapshot looks."""

    def tick(self) -> int:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        rate = 1 / (1 + self.tick())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(rate)
        return super().step(closure)


class InClass(Ticking):
    ticks = 0

    def tick(self) -> int:
        InClass.ticks += 1
        return InClass.ticks


class InModule(Ticking):
    def tick(self) -> int:
        global _ticks
        _ticks += 1
        return _ticks


class InDefault(Ticking):
    def tick(self, ticks: list[int] = [0]) -> int:  # noqa: B006
        ticks[0] += 1
        return ticks[0]


class InClosure(Ticking):
    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        ticks = 0

        def tick() -> int:
            nonlocal ticks
            ticks += 1
            return ticks

        self.tick = tick  # type: ignore[method-assign]


class InIterator(Ticking):
    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.ticks = itertools.count()

    def tick(self) -> int:
        return next(self.ticks)


class InGenerator(InIterator):
    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.ticks = (t for t in range(1000))  # type: ignore[assignment]


class OnParameter(Ticking):
    def tick(self) -> int:
        first: Any = self.param_groups[0]["params"][0]
        first.ticks = getattr(first, "ticks", 0) + 1
        return int(first.ticks)


_ticks = 0
OWN = {
    kind.__name__: kind
    for kind in (Jumpy, Attribute, Overwriting, Langevin, Nested, Generators, Weak)
}
HIDDEN = {
    kind.__name__: kind
    for kind in (InClass, InModule, InDefault, InClosure, InIterator, InGenerator, OnParameter)
}


def make_optimizer(
    name: str, groups: list[Any], sample: tuple[Any, dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """Makes a fresh optimizer by name; a plain torch class name uses its defaults.

    Args:
        name: See above; "Class: sample" is an entry of torch's database.
        groups: Parameters or groups.
        sample: That entry, if it was looked up before.
    """
    if name in OWN | HIDDEN:
        return (OWN | HIDDEN)[name](groups)
    if name.startswith("pypi: "):
        import torch_optimizer

        return getattr(torch_optimizer, name.removeprefix("pypi: "))(groups, lr=1e-3)
    if ": " in name:
        kind, options = sample or torch_optimizers()[name]
        return kind(groups, **copy.deepcopy(options))  # a learning rate may be a tensor
    return getattr(torch.optim, name)(groups, lr=1e-3)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t // 2)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9 if t % 3 else 1.2),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=5, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [3, 4, 9], gamma=0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=9, power=2),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-4, 4e-3, 3, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: schedulers.CyclicLR(o, 1e-4, 4e-3, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=4e-3, total_steps=15),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.LinearLR(o, start_factor=0.1, total_iters=4),
            schedulers.ExponentialLR(o, gamma=0.8),
        ],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=5), schedulers.ExponentialLR(o, 0.95)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=5e-4, anneal_epochs=6),
}


def make_scheduler(name: str, optimizer: torch.optim.Optimizer) -> Any:
    """Makes a fresh scheduler by name."""
    return SCHEDULERS[name](optimizer)
