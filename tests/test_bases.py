"""Several optimizers wrapped as one: bitwise the loop that steps them in turn."""

import copy

import pytest
import torch

from picardopt import ParallelPicardOptimizer, step_rng

STEPS = 30


def make_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return model.bfloat16()  # coarse numbers: guesses are right in every bit more often


def make_bases(model):
    return [
        torch.optim.Adam(model[0].parameters(), lr=1e-3),
        torch.optim.SGD(model[2].parameters(), lr=1e-3, momentum=0.9),
    ]


def closure_of(model):
    def closure(step):
        for p in model.parameters():
            p.grad = None
        x = torch.randn(4, 8).bfloat16()
        loss = (model(x).sign() * x.sum(1, keepdim=True) + model(x)).mean()
        loss.backward()
        return loss

    return closure


def sequential(model, bases):
    closure = closure_of(model)
    for t in range(STEPS):
        with step_rng(5, t):
            closure(t)
            for base in bases:
                base.step()


def wrapped(model, window):
    return ParallelPicardOptimizer(
        make_bases(model), window=window, tolerance=0, total_steps=STEPS, seed=5
    )


def assert_same(model, other, state, other_state):
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert state[a].keys() == other_state[b].keys() != set()
        for key, value in state[a].items():
            assert value is other_state[b][key] or torch.equal(value, other_state[b][key])


@pytest.mark.parametrize("window", [1, 4, 7])
def test_bitwise_the_loop_that_steps_them_in_turn(window):
    expected, model = make_model(), make_model()
    bases = make_bases(expected)
    sequential(expected, bases)
    optimizer = wrapped(model, window)
    closure = closure_of(model)
    for _ in range(STEPS):
        optimizer.step(closure)
    state = {**bases[0].state, **bases[1].state}
    assert_same(expected, model, state, optimizer.state)
    if window > 1:
        assert max(optimizer.stats.strides) >= 2
        assert optimizer.stats.sweeps < STEPS


def test_one_state_dict_resumes_with_another_window():
    expected, first, second = make_model(), make_model(), make_model()
    bases = make_bases(expected)
    sequential(expected, bases)
    optimizer, closure = wrapped(first, 4), closure_of(first)
    for _ in range(11):
        optimizer.step(closure)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed, closure = wrapped(second, 6), closure_of(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.step_index == 11
    assert len(resumed.param_groups) == 2
    for _ in range(STEPS - 11):
        resumed.step(closure)
    assert_same(expected, second, {**bases[0].state, **bases[1].state}, resumed.state)


def test_each_optimizers_hooks_fire_once_a_commit():
    model = make_model()
    optimizer, closure = wrapped(model, 5), closure_of(model)
    calls = []
    for index, base in enumerate(optimizer.base.optimizers):
        base.register_step_post_hook(lambda *_, index=index: calls.append(index))
    for _ in range(12):
        optimizer.step(closure)
    assert calls == [0, 1] * 12


def test_copies_are_whole():
    model = make_model()
    optimizer, closure = wrapped(model, 4), closure_of(model)
    for _ in range(3):
        optimizer.step(closure)
    copied = copy.deepcopy(optimizer)
    assert copied.step_index == 3
    assert len(copied.state) == len(optimizer.state) == 4
    assert not set(copied.state) & set(optimizer.state)


def test_a_parameter_may_be_in_one_only():
    model = make_model()
    with pytest.raises(ValueError, match=r"base\[1\]"):
        ParallelPicardOptimizer([torch.optim.SGD(model.parameters(), lr=0.1)] * 2)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ParallelPicardOptimizer([])


def test_a_group_must_say_whose_it_is():
    optimizer = wrapped(make_model(), 2)
    with pytest.raises(TypeError, match="add_param_group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def lora_run(tolerance, measured=True, steps=12):
    """A steady scene beside a second base whose parameter jumps with each step's draw."""
    scene, lora = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(3))
    bases = [torch.optim.SGD([scene], lr=1e-3), torch.optim.SGD([lora], lr=1.0)]

    def closure():
        scene.grad = lora.grad = None
        loss = scene.sum() + (lora * torch.randn(3)).sum()
        loss.backward()
        return loss

    optimizer = ParallelPicardOptimizer(
        bases, window=4, tolerance=tolerance, measured=bases[:1] if measured else None
    )
    for _ in range(steps):
        optimizer.step(closure)
    return scene.detach(), lora.detach(), optimizer.stats


def test_only_measured_bases_count_in_residuals():
    *_, everything = lora_run(1e-4, measured=False)
    *_, scene_alone = lora_run(1e-4)
    assert everything.strides[:2] == [1, 4]  # the draws are right at the second try
    assert scene_alone.strides == [4, 4, 4]
    # Four steps of 1e-3 at most lie between a guess and its iterate.
    assert all(0 < r <= 16.1e-6 for sweep in scene_alone.residuals for r in sweep)


def test_at_tolerance_0_all_of_them_count():
    scene, lora, stats = lora_run(0)
    expected_scene, expected_lora, _ = lora_run(0, measured=False)
    assert torch.equal(scene, expected_scene)
    assert torch.equal(lora, expected_lora)
    assert stats.strides[0] == 1


@pytest.mark.parametrize(("measured", "match"), [([], "nothing"), ("other", "not one of the base")])
def test_measured_names_some_of_the_bases(measured, match):
    bases = make_bases(make_model())
    if measured == "other":
        measured = make_bases(make_model())
    with pytest.raises(ValueError, match=match):
        ParallelPicardOptimizer(bases, measured=measured)
