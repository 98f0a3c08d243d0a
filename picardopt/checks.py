"""Refuses unusable arguments and base optimizers at construction, with a remedy."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from picardopt.closure import captured_by
from picardopt.errors import UnsupportedOptimizerError

# Optimizers that evaluate the closure inside their step, even if their signature makes it optional.
_NEED_CLOSURE = {
    *("lbfgs", "sam", "gsam", "wsam", "bsam", "looksam", "friendlysam", "samwrapper", "alig"),
    *("adahessian", "sophiah"),  # read the Hessian through the loss's graph
}
_SHARDED = {"DTensor", "FlatParameter"}
_NEED_SPARSE = {"sparseadam"}


def check_base(base: object) -> None:
    """Refuses a base that cannot be stepped, as it is, from dense gradients alone.

    Raises:
        TypeError: If it is not a torch optimizer, or already wrapped.
        ValueError: If it has no parameters.
        UnsupportedOptimizerError: If its step needs a closure, or its gradients or parameters are sparse or sharded.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base={base!r}: give a torch.optim.Optimizer (the object, not its class)")
    names = {cls.__name__.lower() for cls in type(base).__mro__}
    if "parallelpicardoptimizer" in names:
        raise TypeError("base is already a ParallelPicardOptimizer: wrap the optimizer inside it")
    if not isinstance(getattr(base, "param_groups", None), list):
        raise UnsupportedOptimizerError(
            f"base={type(base).__name__}: it has no list of param_groups; wrap the optimizer inside it"
        )
    if names & _NEED_CLOSURE or _requires_closure(base):
        raise UnsupportedOptimizerError(
            f"base={type(base).__name__}: its step evaluates the closure itself, so a step is not a function of "
            "one gradient; use an optimizer that steps from gradients (Adam, SGD, ...)"
        )
    if names & _NEED_SPARSE:
        raise UnsupportedOptimizerError(
            f"base={type(base).__name__}: it needs sparse gradients; use Adam with sparse=False embeddings"
        )
    if not any(group["params"] for group in base.param_groups):
        raise ValueError(
            f"base={type(base).__name__}: it has no parameters; add them before wrapping it"
        )
    if not any(is_lazy(p) or p.numel() for group in base.param_groups for p in group["params"]):
        raise ValueError(
            f"base={type(base).__name__}: all of its parameters are empty (no elements), so there is nothing to train"
        )
    for group in base.param_groups:
        for p in group["params"]:
            _check_parameter(base, p)


def _check_parameter(base: Optimizer, p: Tensor) -> None:
    """Refuses a parameter that cannot be copied, compared and summed as it is."""
    name = type(base).__name__
    if any(item is base for hook in _backward_hooks(p) for item in captured_by(hook)):
        raise UnsupportedOptimizerError(
            f"base={name}: it steps inside backward, from hooks on its parameters, so there is "
            "no gradient to run ahead with; use it without them (no gradient release, not LOMO)"
        )
    if getattr(p, "grad_dtype", p.dtype) not in (None, p.dtype):
        raise UnsupportedOptimizerError(
            f"base has a {p.dtype} parameter with grad_dtype={p.grad_dtype}: gradients are kept in the "
            "parameter's own dtype here; unset grad_dtype"
        )
    if {cls.__name__ for cls in type(p).__mro__} & _SHARDED:
        raise UnsupportedOptimizerError(
            f"base has a {type(p).__name__} parameter: a rank holds only a shard of it (fully_shard, FSDP, "
            "tensor parallelism), but guesses, residuals and the exchange need the whole iterate on every "
            "rank, and ranks that evaluate different steps need different iterates; keep parameters whole, and "
            'split the batch with mesh= (a "data" dim), with or without DistributedDataParallel'
        )
    if is_lazy(p):
        raise UnsupportedOptimizerError(
            f"base has an uninitialized parameter ({type(p).__name__}): run the model once before wrapping its "
            "optimizer"
        )
    if p.is_meta:
        raise UnsupportedOptimizerError(
            f"base has a parameter of shape {tuple(p.shape)} on the meta device, which has no values: put the model on "
            "a real device (module.to_empty(device=...), then initialize it) before wrapping its optimizer"
        )
    if p.dtype.itemsize == 1 and p.dtype.is_floating_point:
        raise UnsupportedOptimizerError(
            f"base has a {p.dtype} parameter: torch cannot add or compare numbers of that type; keep the optimizer's "
            "parameters in bfloat16 or float32 and convert them in the closure"
        )
    if p.layout is not torch.strided:
        raise UnsupportedOptimizerError(
            f"base has a parameter of layout {p.layout}: only dense ones work"
        )


def check_arguments(
    window: object,
    total_steps: object,
    seed: object,
    nonfinite: object,
    timeout: object,
    secants: object,
) -> None:
    """Checks the constructor's options.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """
    _integer(
        "window", window, 1, "steps evaluated per sweep, or None for one per rank", optional=True
    )
    _integer("total_steps", total_steps, 1, "steps of the whole run, or None", optional=True)
    _integer("secants", secants, 0, "pairs of drifts to correct with, or None", optional=True)
    _integer("seed", seed, None, "any integer")
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"nonfinite={nonfinite!r}: give 'raise' or 'skip'")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout={timeout!r}: give seconds, a number")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout={timeout!r}: give seconds, more than 0 and finite")


def check_lr_scheduler(lr_scheduler: object) -> None:
    """Refuses a scheduler that a rollout cannot step.

    Raises:
        TypeError: If it has no ``step()`` that can be called without arguments.
    """
    if lr_scheduler is None or isinstance(lr_scheduler, ReduceLROnPlateau):
        return
    step = getattr(type(lr_scheduler), "step", None)
    if not callable(step):
        raise TypeError(
            f"lr_scheduler={lr_scheduler!r}: give a torch.optim.lr_scheduler object or None"
        )
    parameters = list(inspect.signature(step).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(p.default is inspect.Parameter.empty and p.kind in named for p in parameters):
        raise TypeError(
            f"lr_scheduler={type(lr_scheduler).__name__}: its step() needs arguments, so future rates cannot be "
            "computed; leave lr_scheduler=None (still exact, with shorter strides)"
        )


def check_mode() -> None:
    """Refuses inference mode, in which no closure can make gradients.

    Raises:
        RuntimeError: If it is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step(closure) was called inside torch.inference_mode(), where there are no gradients: call it outside "
            "(torch.no_grad() around it does no harm)"
        )


def check_step_index(value: object) -> None:
    """Refuses a value that is not a number of committed steps.

    Raises:
        ValueError: If it is not an integer, or negative.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"step_index={value!r}: give the number of committed steps, an integer >= 0"
        )


def _integer(
    name: str, value: object, minimum: int | None, meaning: str, *, optional: bool = False
) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: give an integer ({meaning})")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value!r}: give an integer >= {minimum} ({meaning})")


def _requires_closure(base: Optimizer) -> bool:
    try:
        parameter = inspect.signature(type(base).step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _backward_hooks(parameter: Tensor) -> list[object]:
    """Returns the hooks that run inside backward once a parameter's gradient is ready."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    registries = (getattr(parameter, name, None) for name in names)
    return [hook for registry in registries for hook in (registry or {}).values()]
