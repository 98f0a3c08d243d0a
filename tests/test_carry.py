"""Carry: what a step rewrites besides parameters is carried along, bitwise at tolerance 0."""

import copy

import pytest
import torch

from picardopt import Carry, ImpureClosureError, ParallelPicardOptimizer, step_rng

STEPS = 24


class Grid(torch.nn.Module):
    """A parameter whose gradient hardly depends on it, and buffers that every step rewrites."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.norm = torch.nn.BatchNorm1d(6)
        for p in self.norm.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        loss = (self.norm(x) * self.weight).mean() * (1 + (self.average > 0).float().mean())
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * x.mean(0))  # depends on the step alone
            self.count.add_(1)
        return loss


class Teacher(torch.nn.Module):
    """A moving average of the parameter itself: the carry depends on the guess."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6).bfloat16())
        self.register_buffer("teacher", torch.zeros(6, dtype=torch.bfloat16))

    def forward(self, x):
        loss = ((self.weight - self.teacher).sign() * x[0].bfloat16() * self.weight).sum()
        with torch.no_grad():
            self.teacher.lerp_(self.weight, 0.25)
        return loss


def closure_of(model):
    def closure():
        model.weight.grad = None
        loss = model(torch.randn(16, 6))
        loss.backward()
        return loss

    return closure


def base_of(model):
    return torch.optim.Adam([model.weight], lr=1e-2)


def sequential(model, steps=STEPS):
    base, closure = base_of(model), closure_of(model)
    losses, states = [], []
    for t in range(steps):
        with step_rng(2, t):
            losses.append(closure().detach())
            base.step()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return losses, states


def assert_same_state(state, expected):
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("kind", [Grid, Teacher])
@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("as_module", [True, False])
def test_bitwise_after_every_step(kind, window, as_module):
    losses, states = sequential(kind())
    model = kind()
    carry = model if as_module else list(model.buffers())
    optimizer = ParallelPicardOptimizer(
        base_of(model), window=window, tolerance=0, total_steps=STEPS, seed=2, carry=carry
    )
    closure = closure_of(model)
    for t in range(STEPS):
        assert torch.equal(optimizer.step(closure), losses[t])
        assert_same_state(model.state_dict(), states[t])
    if window > 1 and kind is Teacher:  # the grid's average is a chain of its own: one link a sweep
        assert max(optimizer.stats.strides) >= 2
        assert optimizer.stats.sweeps < STEPS


def test_seven_accepted_steps_keep_seven_updates():
    model = Grid()
    optimizer = ParallelPicardOptimizer(
        base_of(model), window=7, tolerance=float("inf"), seed=2, carry=model
    )
    closure = closure_of(model)
    for _ in range(7):
        optimizer.step(closure)
    assert optimizer.stats.strides == [7]
    _, states = sequential(Grid(), 7)
    # All slots started from the head's carry: increments add up, but for the decay of an average.
    assert int(model.count) == int(model.norm.num_batches_tracked) == 7
    assert (model.average - states[-1]["average"]).abs().max() < 0.05


def test_a_flag_that_few_steps_rewrite_stays_over_the_others():
    """Though these were evaluated where it was still wrong."""
    flags, weight = torch.zeros(4, dtype=torch.bool), torch.nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([weight], lr=0.125)
    optimizer = ParallelPicardOptimizer(base, window=8, tolerance=0, carry=[flags])
    slopes = torch.arange(4.0)

    def closure(step):
        optimizer.zero_grad()
        if step % 10 == 0:
            flags.copy_(torch.tensor([step == 0, step == 10, True, False]))
        loss = (weight * slopes * (1 + flags.float())).sum()
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    sums = torch.tensor([10 * 2 + 14, 10 + 10 * 2 + 4, 2 * 24, 24])
    assert torch.equal(weight.detach(), -0.125 * sums * slopes)
    assert flags.tolist() == [False, False, True, False]
    assert list(optimizer.stats.strides)[:3] == [1, 1, 8]


def test_undeclared_changes_are_refused_by_name_and_undone():
    model = Grid()
    optimizer = ParallelPicardOptimizer(
        base_of(model), window=4, seed=2, carry=[model.average, model.count]
    )
    with pytest.raises(ImpureClosureError, match=r"buffer Grid\.norm\.running_mean") as caught:
        optimizer.step(closure_of(model))
    assert "average" not in str(caught.value)
    assert "carry=" in str(caught.value)
    assert_same_state(model.state_dict(), Grid().state_dict())


def test_a_failed_closure_leaves_the_carry_at_the_last_commit():
    model = Grid()
    optimizer = ParallelPicardOptimizer(
        base_of(model), window=4, tolerance=0, seed=2, carry=model, audit="never"
    )
    good = closure_of(model)

    def bad(step):
        good()
        if step == 5:
            raise RuntimeError("planted")

    for _ in range(5):
        optimizer.step(good)
    before = copy.deepcopy(model.state_dict())
    optimizer.step_index = 5  # drops the queue
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(bad)
    assert_same_state(model.state_dict(), before)


def test_a_tensor_that_the_closure_replaces_is_refused():
    model = Grid()
    optimizer = ParallelPicardOptimizer(base_of(model), window=3, carry=model)
    closure = closure_of(model)

    def replacing():
        loss = closure()
        model.average = model.average.clone()
        return loss

    with pytest.raises(RuntimeError, match="in place"):
        optimizer.step(replacing)


@pytest.mark.parametrize(
    ("carry", "error", "match"),
    [
        (torch.zeros(3), TypeError, "a list of tensors"),
        (3, TypeError, "a list of tensors"),
        ([1.0], TypeError, r"carry\[0\]"),
        ([torch.zeros(2, requires_grad=True)], ValueError, "requires a gradient"),
    ],
)
def test_what_cannot_be_carried_is_refused(carry, error, match):
    with pytest.raises(error, match=match):
        ParallelPicardOptimizer(base_of(Grid()), carry=carry)


def test_a_parameter_is_no_carry():
    model = Grid()
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="parameter of the optimizer"):
        ParallelPicardOptimizer(base_of(model), carry=[model.weight])


class Occupancy(torch.nn.Module):
    """A grid that only its update rewrites: a maximum of the past and of what the closure reports."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6).bfloat16())
        self.register_buffer("grid", torch.zeros(6))
        self.register_buffer("teacher", self.weight.detach().clone())

    def closure(self):
        self.weight.grad = None
        x = torch.randn(6).bfloat16()
        loss = (self.weight.sign() * x * self.weight * (self.grid < 1.5)).sum()
        loss.backward()
        return {"loss": loss, "density": x.float().abs()}

    def update(self, returned):
        self.grid.copy_(torch.maximum(0.95 * self.grid, returned["density"]))
        self.grid.add_(0.01 * torch.rand(6))  # from the step's own stream
        self.teacher.lerp_(self.weight, 0.25)  # the parameters after the step


def occupancy_run(steps=STEPS):
    model = Occupancy()
    base, losses, states = base_of(model), [], []
    for t in range(steps):
        with step_rng(2, t):
            returned = model.closure()
            base.step()
            with torch.no_grad():
                model.update(returned)
        losses.append(returned["loss"].detach())
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return losses, states


def updating(model, **options):
    carry = Carry(model, update=model.update)
    return ParallelPicardOptimizer(
        base_of(model), seed=2, carry=carry, **{"tolerance": 0, **options}
    )


@pytest.mark.parametrize("window", [1, 4, 7])
def test_an_update_of_its_own_is_bitwise(window):
    losses, states = occupancy_run()
    model = Occupancy()
    optimizer = updating(model, window=window)
    for t in range(STEPS):
        assert torch.equal(optimizer.step(model.closure)["loss"], losses[t])
        assert_same_state(model.state_dict(), states[t])


def update_on_ranks():
    model = Occupancy()
    optimizer = updating(model, window=5)
    for _ in range(STEPS):
        optimizer.step(model.closure)
    return model.state_dict(), optimizer.stats.strides


def test_an_update_of_its_own_on_processes(pools):
    for state, strides in pools(2).run(update_on_ranks):
        assert_same_state(state, occupancy_run()[1][-1])
        assert max(strides) >= 2


def test_seven_accepted_steps_make_seven_updates():
    model = Occupancy()
    optimizer = updating(model, window=7, tolerance=float("inf"))
    for _ in range(7):
        optimizer.step(model.closure)
    assert optimizer.stats.strides == [7]
    grid, expected = model.grid, occupancy_run(7)[1][-1]["grid"]
    assert torch.equal(grid, expected)  # it depends on the reports alone, whatever was guessed


def test_a_closure_must_leave_to_the_update_what_is_its():
    model = Occupancy()
    optimizer = updating(model, window=3)

    def closure():
        model.grid.add_(1)
        return model.closure()

    with pytest.raises(ImpureClosureError, match=r"carry\[0\], which only its update"):
        optimizer.step(closure)
    assert_same_state(model.state_dict(), Occupancy().state_dict())


def test_an_update_that_puts_other_tensors_there_is_refused():
    model = Occupancy()

    def update(returned):
        model.grid = returned["density"]

    optimizer = ParallelPicardOptimizer(base_of(model), window=3, carry=Carry(model, update=update))
    with pytest.raises(RuntimeError, match="other tensors"):
        optimizer.step(model.closure)


def test_an_update_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="update=3"):
        ParallelPicardOptimizer(base_of(Grid()), carry=Carry([], update=3))
