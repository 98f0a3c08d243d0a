"""Law 1 on an accelerator, with torch's capturable, fused and foreach samples."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from picardopt import ParallelPicardOptimizer, step_rng
from picardopt.compat import accelerator
from tests.helpers.problems import Problem, network, quantize
from tests.helpers.runs import Trace, assert_parallel, assert_same_trace, make_closure, stats_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not accelerator(), reason="needs an accelerator"),
]
STEPS = 14
NAMES = ("Adadelta", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def on_device(device: torch.device) -> Problem:
    """The network on a device, its batch drawn there, so that the device's generator counts."""
    problem = network()
    first, bias, second, gain = (
        torch.nn.Parameter(p.detach().to(device)) for p in problem.parameters
    )

    def loss(step: int) -> Tensor:
        x, y = torch.randn(6, 3, device=device), torch.randn(6, 2, device=device)
        rounded = [quantize(p) for p in (first, bias, second, gain)]
        hidden = torch.tanh(x @ rounded[0].T + rounded[1])
        return (hidden @ rounded[2].T * rounded[3] - y).square().mean()

    return Problem([first, bias, second, gain], loss)


def samples() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every sample of torch's database plain, capturable, fused and foreach where it can be."""
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        name = info.optim_cls.__name__
        if name not in NAMES:
            continue
        for sample in info.optim_inputs_func("cpu"):
            variants: dict[str, dict[str, Any]] = {"plain": {}, "foreach": {"foreach": True}}
            if "cuda" in info.supports_fused_on:
                variants["fused"] = {"fused": True}
            if name != "SGD":
                variants["capturable"] = {"capturable": True, "foreach": False}
                variants["capturable foreach"] = {"capturable": True, "foreach": True}
            for variant, options in variants.items():
                found[f"{name}: {sample.desc} & {variant}"] = (
                    info.optim_cls,
                    {**sample.kwargs, **options},
                )
    return found


SAMPLES = samples() if accelerator() else {}


def run(kind: Any, options: dict[str, Any], device: torch.device, window: int | None) -> Trace:
    problem = on_device(device)
    base = kind(problem.groups, **copy.deepcopy(options))
    trace = Trace()
    if window is None:
        closure = make_closure(problem, base.zero_grad)
        for t in range(STEPS):
            with step_rng(0, t):
                loss = closure(t)
                base.step()
            trace.record(loss, problem, base)
        return trace
    optimizer = ParallelPicardOptimizer(base, window=window, tolerance=0, seed=0)
    closure = make_closure(problem, optimizer.zero_grad)
    for _ in range(STEPS):
        trace.record(optimizer.step(closure), problem, optimizer)
    trace.stats = stats_of(optimizer)
    return trace


@pytest.mark.parametrize("name", SAMPLES)
def test_exact_on_the_accelerator(name: str) -> None:
    device = accelerator()
    assert device is not None
    kind, options = SAMPLES[name]
    trace = run(kind, options, device, window=4)
    assert_same_trace(trace, run(kind, options, device, window=None))
    assert_parallel(trace)


def test_the_devices_generator_is_put_back() -> None:
    device = accelerator()
    assert device is not None
    module = torch.get_device_module(device)
    before = module.get_rng_state()
    with step_rng(0, 1):
        drawn = torch.rand(3, device=device)
    assert torch.equal(module.get_rng_state(), before)
    with step_rng(0, 1):
        assert torch.equal(torch.rand(3, device=device), drawn)
