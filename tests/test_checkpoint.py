"""Law 6: speculation is disposable; a state_dict taken anywhere resumes at any window."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from picardopt import (
    AdaptiveTolerance,
    CheckpointError,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
    load_checkpoint,
    save_checkpoint,
    step_rng,
)
from tests.helpers.pool import Pools
from tests.helpers.problems import PROBLEMS
from tests.helpers.runs import (
    Case,
    Trace,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    sequential,
    wrap,
)

CASES = [
    Case("network", "Adam", steps=18),
    Case("groups", "SGD: nesterov", steps=18),
    Case("network", "RMSprop", scheduler="ExponentialLR", steps=18),
]


def run(
    problem: Any, optimizer: Any, scheduler: Any, steps: int, trace: Trace | None = None
) -> Trace:
    trace = trace or Trace()
    closure = make_closure(problem, optimizer.zero_grad)
    for _ in range(steps):
        loss = optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        trace.record(loss, problem, optimizer)
    return trace


@pytest.mark.parametrize("resumed", [1, 3, 7])
@pytest.mark.parametrize(
    "saved_at", [0, 5, 7, *(pytest.param(t, marks=pytest.mark.slow) for t in (1, 6, 8))]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.optimizer)
def test_resuming_with_another_window(case: Case, saved_at: int, resumed: int) -> None:
    """Saved in the middle of a window, resumed in fresh objects, bitwise at tolerance 0."""
    problem, optimizer, scheduler = wrap(case, window=4)
    trace = run(problem, optimizer, scheduler, saved_at)
    saved = copy.deepcopy(
        {
            "parameters": [p.detach() for p in problem.parameters],
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
    )
    run(problem, optimizer, scheduler, 3)  # the old run goes on; the checkpoint must not notice
    problem, optimizer, scheduler = wrap(case, window=resumed)
    with torch.no_grad():
        for p, value in zip(problem.parameters, saved["parameters"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    assert optimizer.step_index == saved_at
    assert optimizer.window == resumed
    run(problem, optimizer, scheduler, case.steps - saved_at, trace)
    assert_same_trace(trace, sequential(case))


def test_loading_back_in_place_drops_the_queue() -> None:
    """A state loaded into the running object, parameters included, goes on from there."""
    case = CASES[0]
    problem, optimizer, _ = wrap(case, window=4)
    run(problem, optimizer, None, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    parameters = [p.detach().clone() for p in problem.parameters]
    run(problem, optimizer, None, 6)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(problem.parameters, parameters, strict=True):
            p.copy_(value)
    assert optimizer.step_index == 4
    run(problem, optimizer, None, case.steps - 4)
    assert_same_bits([p.detach() for p in problem.parameters], sequential(case).parameters[-1])


def test_a_plain_base_state_loads_too() -> None:
    """A checkpoint made before the wrapper came, or by a tool that drops our key."""
    case = CASES[0]
    problem, optimizer, _ = wrap(case, window=4)
    run(problem, optimizer, None, 7)
    plain = copy.deepcopy(optimizer.base.state_dict())
    parameters = [p.detach().clone() for p in problem.parameters]
    problem, optimizer, _ = wrap(case, window=3)
    with torch.no_grad():
        for p, value in zip(problem.parameters, parameters, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(plain)
    optimizer.step_index = 7
    run(problem, optimizer, None, case.steps - 7)
    assert_same_bits([p.detach() for p in problem.parameters], sequential(case).parameters[-1])


def test_our_state_loads_into_a_plain_base() -> None:
    case = CASES[0]
    problem, optimizer, _ = wrap(case, window=4)
    run(problem, optimizer, None, 5)
    _, base = case.build()
    base.load_state_dict(optimizer.state_dict())
    assert_same_bits(base.state_dict()["state"], optimizer.base.state_dict()["state"])


@pytest.mark.parametrize("kind", [AdaptiveTolerance, StepRelativeTolerance])
def test_the_tolerance_is_kept(kind: Any) -> None:
    case = Case("smooth", "Adam", steps=9)
    problem, optimizer, _ = wrap(case, window=4, tolerance=kind())
    run(problem, optimizer, None, 9)
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.tolerance.value != kind().value
    _, resumed, _ = wrap(case, window=6, tolerance=kind())
    resumed.load_state_dict(saved)
    assert resumed.tolerance.value == optimizer.tolerance.value


def test_the_seed_is_kept() -> None:
    """A run that is resumed draws the numbers of the run that was saved."""
    case = Case("network", "Adam", steps=12, seed=11)
    problem, optimizer, _ = wrap(case, window=4)
    trace = run(problem, optimizer, None, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    parameters = [p.detach().clone() for p in problem.parameters]
    problem, optimizer, _ = wrap(case, window=4, seed=99)
    with torch.no_grad():
        for p, value in zip(problem.parameters, parameters, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    assert optimizer.seed == 11
    run(problem, optimizer, None, 7, trace)
    assert_same_trace(trace, sequential(case))


def everything_of(problem: Any, optimizer: Any) -> Any:
    return copy.deepcopy(
        [
            [p.detach() for p in problem.parameters],
            optimizer.state_dict(),
            optimizer.step_index,
            optimizer.seed,
        ]
    )


def another_shape(state: Any) -> None:
    """As a state of a wider model: torch's own load_state_dict takes it without a word."""
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][0][key] = torch.zeros(5, 3)
    state["picard"]["shapes"][0] = [5, 3]


def fewer_parameters(state: Any) -> None:
    state["param_groups"][0]["params"].pop()


def another_group(state: Any) -> None:
    state["param_groups"].append(dict(state["param_groups"][0], params=[]))


def no_groups(state: Any) -> None:
    del state["param_groups"]


def no_step(state: Any) -> None:
    del state["picard"]["step"]


def step_of_nothing(state: Any) -> None:
    state["picard"]["step"] = None


def no_tolerance(state: Any) -> None:
    del state["picard"]["tolerance"]


BAD = (
    another_shape, fewer_parameters, another_group, no_groups, no_step, step_of_nothing, no_tolerance,
)  # fmt: skip


@pytest.mark.parametrize("harm", BAD, ids=lambda harm: harm.__name__)
def test_a_state_that_does_not_fit_changes_nothing(harm: Any) -> None:
    """One error, and the run goes on from where it stood, bitwise."""
    case = Case("network", "Adam", steps=18)
    _, other, _ = wrap(case, window=3, tolerance=StepRelativeTolerance(), seed=5)
    state = copy.deepcopy(other.state_dict())
    problem, optimizer, _ = wrap(case, window=4)
    trace = run(problem, optimizer, None, 7)
    state["state"] = copy.deepcopy(optimizer.state_dict()["state"])
    harm(state)
    before = everything_of(problem, optimizer)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        optimizer.load_state_dict(state)
    assert_same_bits(everything_of(problem, optimizer), before)
    assert_same_trace(run(problem, optimizer, None, 11, trace), sequential(case))


def test_torch_itself_would_take_the_wrong_shape() -> None:
    """Why shapes are kept: if this fails one day, they need not be."""
    _, optimizer, _ = wrap(CASES[0])
    state = optimizer.base.state_dict()
    state["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5, 3)}}
    optimizer.base.load_state_dict(state)


def test_a_state_from_before_shapes_were_kept_loads() -> None:
    problem, optimizer, _ = wrap(CASES[0], window=4)
    run(problem, optimizer, None, 5)
    state = copy.deepcopy(optimizer.state_dict())
    del state["picard"]["shapes"]
    _, resumed, _ = wrap(CASES[0], window=4)
    resumed.load_state_dict(state)
    assert resumed.step_index == 5


# --- Files, other windows and other numbers of real processes --------------------------------------


def part_of_a_run(
    path: Path, load: bool, until: int, window: int | None, tolerance: Any
) -> dict[str, Any]:
    """Trains two optimizers and a carry, from the start or from a file, and saves from rank 0."""
    problem = PROBLEMS["network"]()
    first, bias, second, gain = problem.parameters
    bases = [
        torch.optim.Adam([first, bias], lr=3e-3),
        torch.optim.SGD([second, gain], lr=1e-3, momentum=0.9),
    ]
    grid = torch.zeros(3)
    optimizer = ParallelPicardOptimizer(
        bases, window=window, tolerance=tolerance, carry=[grid], seed=3 * (not load)
    )

    def closure(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        if step % 4 == 3:
            grid.mul_(0.5).add_(torch.randn(3))
        return loss

    if load:
        state = load_checkpoint(path)
        with torch.no_grad():
            for tensor, value in zip([*problem.parameters, grid], state["tensors"], strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
    began = optimizer.tolerance.value
    while optimizer.step_index < until:
        optimizer.step(closure)
    state = {
        "tensors": [t.detach() for t in (*problem.parameters, grid)],
        "optimizer": optimizer.state_dict(),
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_checkpoint(path, state)
    return {"state": state, "strides": optimizer.stats.strides, "began": began}


def sequential_part(until: int) -> Any:
    problem = PROBLEMS["network"]()
    first, bias, second, gain = problem.parameters
    bases = [
        torch.optim.Adam([first, bias], lr=3e-3),
        torch.optim.SGD([second, gain], lr=1e-3, momentum=0.9),
    ]
    grid = torch.zeros(3)
    for step in range(until):
        with step_rng(3, step):
            for p in problem.parameters:
                p.grad = None
            problem.loss(step).backward()
            if step % 4 == 3:
                grid.mul_(0.5).add_(torch.randn(3))
            for base in bases:
                base.step()
    return [*problem.parameters, grid], [base.state_dict()["state"] for base in bases]


def test_resumed_on_other_numbers_of_processes(pools: Pools, tmp_path: Path) -> None:
    """Saved by two, resumed by three, by one and by two, each with another window: the sequential bits."""
    tensors, (adam, sgd) = sequential_part(23)
    path = tmp_path / "run.ckpt"
    saved = pools(2).run(part_of_a_run, path, False, 7, 4, 0)
    assert max(saved[0]["strides"]) > 1
    half_way = path.read_bytes()
    for processes, window in ((3, None), (1, 5), (2, 1)):
        path.write_bytes(half_way)
        args = (path, True, 23, window, 0)
        results = (
            [part_of_a_run(*args)] if processes == 1 else pools(processes).run(part_of_a_run, *args)
        )
        for result in results:
            assert_same_bits(result["state"]["tensors"], [t.detach() for t in tensors])
            state = result["state"]["optimizer"]["state"]
            assert_same_bits({k: state[k] for k in (0, 1)}, adam)
            assert_same_bits([state[k] for k in (2, 3)], list(sgd.values()))
            assert result["state"]["optimizer"]["picard"]["step"] == 23
            assert result["state"]["optimizer"]["picard"]["seed"] == 3
        if window != 1:
            assert max(results[0]["strides"]) > 1
        assert_same_bits(load_checkpoint(path), results[0]["state"])


def test_an_adaptive_tolerance_goes_on_whatever_the_number_of_processes(
    pools: Pools, tmp_path: Path
) -> None:
    """Not exact, but of one window: the same bits on one, two and three processes."""
    path = tmp_path / "run.ckpt"
    tolerance = AdaptiveTolerance(1e-7)
    saved = pools(2).run(part_of_a_run, path, False, 7, 4, tolerance)
    half_way = path.read_bytes()
    alone = part_of_a_run(path, True, 23, 4, AdaptiveTolerance(5.0))
    kept = saved[0]["state"]["optimizer"]["picard"]["tolerance"]["value"]
    assert alone["began"] == kept not in (1e-7, 5.0)
    for processes in (2, 3):
        path.write_bytes(half_way)
        for result in pools(processes).run(
            part_of_a_run, path, True, 23, 4, AdaptiveTolerance(5.0)
        ):
            assert_same_bits(result["state"], alone["state"])
            assert result["strides"] == alone["strides"]
