"""Law 2 and the torch.optim contract: one call, one step, and everything around it as usual."""

import copy
import functools
import io
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from picardopt import ParallelPicardOptimizer, PicardWarning, Restructure, step_rng
from tests.helpers.pool import Pools
from tests.helpers.runs import (
    Case,
    Trace,
    assert_parallel,
    assert_same_bits,
    assert_same_trace,
    make_closure,
    parallel,
    quiet,
    sequential,
    stats_of,
    wrap,
)

CASE = Case("network", "Adam", steps=13)


def test_the_trace_is_that_of_each_step() -> None:
    """.grad, parameters and state after every call are that step's (checked by every trace)."""
    trace = parallel(CASE, window=4)
    assert_same_trace(trace, sequential(CASE))
    steps = [int(state["state"][0]["step"]) for state in trace.states]
    assert steps == list(range(1, 14))
    assert all(not loss.requires_grad and loss.grad_fn is None for loss in trace.losses)


def test_hooks_fire_once_per_commit_and_see_it() -> None:
    """On the wrapper, on the base and global; never for speculation."""
    problem, optimizer, _ = wrap(CASE, window=4)
    base = optimizer.base
    count: Counter[str] = Counter()
    after: list[list[torch.Tensor]] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: count.update(["wrapper pre"])),
        optimizer.register_step_post_hook(lambda *_: count.update(["wrapper post"])),
        optimizer.register_step_post_hook(
            lambda *_: after.append([p.detach().clone() for p in problem.parameters])
        ),
        base.register_step_pre_hook(lambda *_: count.update(["base pre"])),
        base.register_step_post_hook(lambda *_: count.update(["base post"])),
        register_optimizer_step_pre_hook(lambda *_: count.update(["global pre"])),
        register_optimizer_step_post_hook(lambda *_: count.update(["global post"])),
    ]
    try:
        closure = make_closure(problem, optimizer.zero_grad)
        for t in range(1, CASE.steps + 1):
            optimizer.step(closure)
            assert len(count) == 6
            assert set(count.values()) == {t}, count
    finally:
        for handle in handles:
            handle.remove()
    assert_same_bits(after, sequential(CASE).parameters)
    optimizer.step(closure)
    assert set(count.values()) == {CASE.steps}


def test_a_base_hook_that_changes_gradients_stays_exact() -> None:
    """Clipping in a pre-hook of the base acts on every commit, as it does without the wrapper."""

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], 0.1
        )

    problem, base = CASE.build()
    base.register_step_pre_hook(clip)
    closure = make_closure(problem, base.zero_grad)
    for t in range(CASE.steps):
        with step_rng(0, t):
            closure(t)
            base.step()
    expected = [p.detach().clone() for p in problem.parameters]

    problem, optimizer, _ = wrap(CASE, window=4)
    optimizer.base.register_step_pre_hook(clip)
    closure = make_closure(problem, optimizer.zero_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        for _ in range(CASE.steps):
            optimizer.step(closure)
    assert_same_bits([p.detach() for p in problem.parameters], expected)


def test_it_is_an_optimizer_with_live_groups_and_state() -> None:
    problem, optimizer, _ = wrap(CASE, window=3)
    base = optimizer.base
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step(make_closure(problem, optimizer.zero_grad))
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.parameters)


def test_the_closure_runs_with_gradients_enabled() -> None:
    problem, optimizer, _ = wrap(CASE, window=3)
    closure = make_closure(problem, optimizer.zero_grad)
    trace = Trace()
    with torch.no_grad():
        for _ in range(CASE.steps):
            trace.record(optimizer.step(closure), problem, optimizer)
    assert_same_trace(trace, sequential(CASE))


def test_a_closure_is_handed_the_step_if_it_has_a_parameter_of_that_name() -> None:
    problem, optimizer, _ = wrap(CASE, window=3)

    def without() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(0)
        loss.backward()
        return loss

    def optional(step: int = -1) -> torch.Tensor:
        assert step >= 1  # never the default: else every step would train on step -1
        return without()

    def bound(step: int) -> torch.Tensor:
        assert step == 77  # functools.partial: the user's own choice
        return without()

    def other(scale: float = 1.0) -> torch.Tensor:
        assert scale == 1.0
        return without()

    with quiet():  # another closure at each step
        for closure in (without, optional, other, functools.partial(bound, step=77)):
            optimizer.step(closure)
        optimizer.step(closure=without)
    optimizer.step_index = 5  # drops what the closures before this one left in the queue
    seen: list[int] = []
    optimizer.step(make_closure(problem, optimizer.zero_grad, seen))
    assert seen[0] == 5


def test_step_without_a_closure_is_one_plain_base_step() -> None:
    """Legal (AMP, distributed checkpointing), without parallelism, and said once."""
    problem, base = CASE.build()
    twin_problem, optimizer, _ = wrap(CASE, window=3)
    for t in range(5):
        for p, q in zip(problem.parameters, twin_problem.parameters, strict=True):
            p.grad = torch.full_like(p, t + 1.0)
            q.grad = p.grad.clone()
        base.step()
        if t == 0:
            with pytest.warns(PicardWarning, match="closure"):
                assert optimizer.step() is None
        else:
            assert optimizer.step() is None
        assert optimizer.step_index == t + 1
    assert_same_bits(
        [p.detach() for p in twin_problem.parameters], [p.detach() for p in problem.parameters]
    )


def test_plain_steps_restructure_when_due() -> None:
    problem, base = CASE.build()
    due: list[int] = []
    optimizer = ParallelPicardOptimizer(
        base, window=3, restructure=Restructure(due.append, lambda step: step % 3 == 1)
    )
    with quiet():
        for _ in range(6):
            for p in problem.parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert due == [1, 4]


def test_closures_and_plain_steps_mix() -> None:
    """A plain step in between moves the parameters: the queue is dropped, nothing is lost."""

    def run(optimizer: Any, problem: Any, parallel: bool) -> list[torch.Tensor]:
        closure = make_closure(problem, optimizer.zero_grad)
        for t in range(10):
            if t in (4, 5):
                for p in problem.parameters:
                    p.grad = torch.full_like(p, 0.3)
                optimizer.step()
            elif parallel:
                optimizer.step(closure)
            else:
                with step_rng(0, t):
                    closure(t)
                    optimizer.step()
        return [p.detach().clone() for p in problem.parameters]

    problem, base = CASE.build()
    expected = run(base, problem, False)
    problem, optimizer, _ = wrap(CASE, window=4)
    with pytest.warns(PicardWarning):
        got = run(optimizer, problem, True)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_whole(copied: str) -> None:
    """The inherited __getstate__ would lose the base; a copy goes on bitwise by itself."""
    problem, optimizer, _ = wrap(CASE, window=4)
    closure = make_closure(problem, optimizer.zero_grad)
    for _ in range(6):
        optimizer.step(closure)
    twin = (
        copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    assert twin.step_index == 6
    assert twin.window == 4
    own = [p for group in twin.param_groups for p in group["params"]]
    assert not any(p is q for p, q in zip(own, problem.parameters, strict=True))
    twin_problem, _ = CASE.build()
    # The problem's loss reads its own tensors: give the copy's values to them and back.
    before = [p.detach().clone() for p in problem.parameters]

    def twin_closure(step: int) -> torch.Tensor:
        with torch.no_grad():
            for p, q in zip(twin_problem.parameters, own, strict=True):
                p.copy_(q)
                p.grad = None
        loss = twin_problem.loss(step)
        loss.backward()
        for p, q in zip(twin_problem.parameters, own, strict=True):
            q.grad = p.grad
        return loss

    for _ in range(7):
        twin.step(twin_closure)
    assert_same_bits([p.detach() for p in own], sequential(CASE).parameters[-1])
    assert_same_bits([p.detach() for p in problem.parameters], before)


def copies_on_a_rank() -> list[str]:
    _, optimizer, _ = wrap(CASE, window=2)
    with pytest.warns(PicardWarning, match="no process group") as told:
        twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    ours = [w.filename for w in told if issubclass(w.category, PicardWarning)]
    assert ours == [__file__, __file__]
    return [repr(twin) for twin in (optimizer, *twins)]


def test_a_copy_leaves_the_process_group_and_says_so(pools: Pools) -> None:
    for original, *copies in pools(2).run(copies_on_a_rank):
        assert "ranks=2" in original
        assert all("ranks=1" in twin for twin in copies)


def test_a_group_added_midway() -> None:
    """The window is flushed; the new parameters take part from the next step on."""

    def run(optimizer: Any, problem: Any, is_parallel: bool) -> list[torch.Tensor]:
        extra = torch.nn.Parameter(torch.ones(2))
        plain = make_closure(problem, optimizer.zero_grad)

        def closure(step: int) -> torch.Tensor:
            if step < 5:
                return plain(step)
            optimizer.zero_grad()
            loss = problem.loss(step) + (extra * torch.randn(2)).sum()
            loss.backward()
            return loss

        for t in range(12):
            if t == 5:
                optimizer.add_param_group({"params": [extra], "lr": 0.01})
            if is_parallel:
                optimizer.step(closure)
            else:
                with step_rng(0, t):
                    closure(t)
                    optimizer.step()
        return [p.detach().clone() for p in [*problem.parameters, extra]]

    problem, base = CASE.build()
    expected = run(base, problem, False)
    problem, optimizer, _ = wrap(CASE, window=3, audit="never")
    assert_same_bits(run(optimizer, problem, True), expected)
    assert len(optimizer.param_groups) == 2 == len(optimizer.base.param_groups)


def test_state_dict_hooks_are_forwarded() -> None:
    problem, optimizer, _ = wrap(CASE, window=3)
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: called.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    optimizer.step(make_closure(problem, optimizer.zero_grad))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["save", "saved", "load", "loaded"]


def test_step_index_is_settable() -> None:
    """Distributed checkpointing drops the extra key of the state: the user sets the step."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE, window=4)
    closure = make_closure(problem, optimizer.zero_grad)
    optimizer.step(closure)
    optimizer.step_index = 1  # what it is; drops whatever was queued
    for _ in range(CASE.steps - 1):
        optimizer.step(closure)
    assert_same_bits([p.detach() for p in problem.parameters], expected.parameters[-1])
    seen: list[int] = []
    optimizer.step_index = 40
    optimizer.step(make_closure(problem, optimizer.zero_grad, seen))
    assert seen[0] == 40
    assert optimizer.step_index == 41


def test_stats_are_consistent() -> None:
    case = Case("network", "Adam", steps=20)
    problem, optimizer, _ = wrap(case, window=5, total_steps=20, audit="never")
    seen: list[int] = []
    closure = make_closure(problem, optimizer.zero_grad, seen)
    for _ in range(case.steps):
        optimizer.step(closure)
    stats = stats_of(optimizer)
    assert stats["steps"] == optimizer.step_index == 20
    assert stats["sweeps"] == len(stats["strides"]) == len(stats["residuals"])
    assert len(stats["tolerances"]) == stats["sweeps"]
    assert sum(stats["strides"]) == 20
    assert stats["mean_stride"] == pytest.approx(20 / stats["sweeps"])
    assert all(
        len(a) == len(b) for a, b in zip(stats["residuals"], stats["tolerances"], strict=True)
    )
    assert stats["drift_evaluations"] == len(seen) == sum(map(len, stats["residuals"]))
    assert stats["wasted_evaluations"] == len(seen) - 20
    assert stats["failed_speculations"] == 0
    assert set(optimizer.stats.seconds) == {"drift", "exchange", "rollout", "commit", "audit"}
    assert optimizer.stats.seconds["drift"] > 0
    assert optimizer.stats.seconds["rollout"] > 0
    assert optimizer.stats.seconds["audit"] == 0


def test_a_sweep_runs_only_when_no_accepted_drift_is_queued() -> None:
    problem, optimizer, _ = wrap(CASE, window=4, audit="never")
    seen: list[int] = []
    closure = make_closure(problem, optimizer.zero_grad, seen)
    left = 0
    for _ in range(CASE.steps):
        before = len(seen)
        optimizer.step(closure)
        if left == 0:
            assert len(seen) > before
            left = optimizer.stats.strides[-1]
        else:
            assert len(seen) == before
        left -= 1
    assert_parallel(Trace(losses=[torch.zeros(())] * CASE.steps, stats=stats_of(optimizer)))


def test_state_dict_is_the_bases_plus_one_key_and_survives_weights_only() -> None:
    problem, optimizer, _ = wrap(CASE, window=4)
    optimizer.step(make_closure(problem, optimizer.zero_grad))
    ours, theirs = optimizer.state_dict(), optimizer.base.state_dict()
    assert len(set(ours) - set(theirs)) <= 1
    assert_same_bits({key: ours[key] for key in theirs}, theirs)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert_same_bits(torch.load(buffer, weights_only=True)["state"], theirs["state"])


def test_the_wrapper_wraps_once() -> None:
    _, optimizer, _ = wrap(CASE, window=4)
    with pytest.raises(TypeError, match="base"):
        ParallelPicardOptimizer(optimizer)
