"""What a closure may look like, and what becomes of gradients that stand in ``.grad`` before it."""

import functools
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import ImpureClosureError, ParallelPicardOptimizer, PicardWarning, step_rng
from tests.helpers.runs import assert_same_bits

STEPS = 12


class Regression:
    """A small model whose step t draws its own batch."""

    def __init__(self, window: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.base = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.optimizer = (
            ParallelPicardOptimizer(self.base, window=window, **options) if window else self.base
        )
        self.seen: list[int] = []

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return (self.model(x) - x[:, :2]).square().mean()

    def backward(self, step: int) -> Tensor:
        self.base.zero_grad()
        loss = self.loss(step)
        loss.backward()
        return loss

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def sequential(step_of: Callable[[Regression, int], Any]) -> list[Tensor]:
    regression = Regression(0)
    for step in range(STEPS):
        with step_rng(0, step):
            step_of(regression, step)
            regression.base.step()
    return regression.weights()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- the step that it is handed -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("kind", ["required", "default", "positional", "keyword", "lambda"])
def test_a_parameter_called_step_receives_the_step(kind: str, window: int) -> None:
    """With a default too: else every step would train on step 0, without a word."""
    regression = Regression(window, tolerance=0)
    backward = regression.backward

    def required(step: int) -> Tensor:
        return backward(step)

    def default(step: int = 0) -> Tensor:
        return backward(step)

    def positional(step: int = 0, /) -> Tensor:
        return backward(step)

    def keyword(*, step: int = 0, scale: float = 1.0) -> Tensor:
        return scale * backward(step)

    closures = {"required": required, "default": default, "positional": positional}
    closures |= {"keyword": keyword, "lambda": lambda step=0: backward(step)}
    for _ in range(STEPS):
        regression.optimizer.step(closures[kind])
    assert same(regression.weights(), sequential(lambda each, step: each.backward(step)))


def test_a_step_that_was_bound_beforehand_stays() -> None:
    regression = Regression(1)
    for step in range(STEPS):
        regression.optimizer.step(
            functools.partial(lambda step: regression.backward(step), step=step)
        )
    assert same(regression.weights(), sequential(lambda each, step: each.backward(step)))


@pytest.mark.parametrize(
    "closure",
    [lambda t: None, lambda step, batch: None, lambda *, index: None],
    ids=["t", "two", "index"],
)
def test_another_required_parameter_is_named(closure: Any) -> None:
    regression = Regression()
    with pytest.raises(TypeError, match=r"required parameter '(t|batch|index)'.*called `step`"):
        regression.optimizer.step(closure)
    assert regression.optimizer.step_index == 0


# -- gradients that stand before it ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("tolerance", [0, None])
def test_micro_batches_in_the_loop_are_refused(tolerance: Any, window: int) -> None:
    """One backward in the loop, one in the closure: torch adds them up, a step run ahead could not."""
    regression = Regression(window, tolerance=tolerance)

    def closure(step: int) -> Tensor:
        loss = regression.loss(step + 1000)
        loss.backward()
        return loss

    before = regression.weights()
    regression.base.zero_grad()
    regression.loss(0).backward()
    with pytest.raises(
        ImpureClosureError, match=r"parameter 0 has a gradient in \.grad.*zero_grad"
    ):
        regression.optimizer.step(closure)
    assert same(regression.weights(), before)
    assert regression.optimizer.step_index == 0
    for _ in range(3):  # the first remedy
        regression.optimizer.step(regression.backward)


@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_that_never_clears_is_refused_before_it_adds_up(window: int) -> None:
    regression = Regression(window, tolerance=float("inf"))

    def closure(step: int) -> Tensor:
        loss = regression.loss(step)
        loss.backward()
        return loss

    regression.optimizer.step(closure)  # right: nothing stood before it
    first = regression.weights()
    with pytest.raises(ImpureClosureError, match="adds to it"):
        regression.optimizer.step(closure)
    assert same(regression.weights(), first)


@pytest.mark.parametrize("tolerance", [0, 1e-4])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    "clears", [lambda step: step % 3 == 0, lambda step: step < 6], ids=["every third", "early"]
)
def test_a_closure_that_clears_at_some_steps_only_is_refused(
    clears: Callable[[int], bool], window: int, tolerance: float
) -> None:
    """Ordinary accumulation over steps: no number of another run may come of it without a word."""
    regression, expected = Regression(window, tolerance=tolerance), Regression(0)

    def closure_of(each: Regression) -> Callable[[int], Tensor]:
        def closure(step: int) -> Tensor:
            if clears(step):
                each.base.zero_grad()
            loss = each.loss(step)
            loss.backward()
            return loss

        return closure

    closure, plain = closure_of(regression), closure_of(expected)
    with pytest.raises(ImpureClosureError, match="adds to it"):
        for step in range(STEPS):
            regression.optimizer.step(closure)
            with step_rng(0, step):
                plain(step)
                expected.base.step()
            if tolerance == 0:
                assert same(regression.weights(), expected.weights())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_a_loop_that_clears_is_as_good(window: int, set_to_none: bool) -> None:
    """``zero_grad`` in the loop: what stands is None, or zeros that the closure adds to."""

    def accumulate(regression: Regression, step: int) -> Tensor:
        loss = regression.loss(step)
        loss.backward()
        return loss

    regression = Regression(window, tolerance=0)
    for _ in range(STEPS):
        regression.optimizer.zero_grad(set_to_none=True)
        regression.optimizer.step(lambda step: accumulate(regression, step))

    def plain(each: Regression, step: int) -> None:
        each.base.zero_grad(set_to_none=True)
        accumulate(each, step)

    assert same(regression.weights(), sequential(plain))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_that_clears_may_find_anything(window: int, set_to_none: bool) -> None:
    regression = Regression(window, tolerance=0)

    def closure(step: int) -> Tensor:
        regression.base.zero_grad(set_to_none=set_to_none)
        loss = regression.loss(step)
        loss.backward()
        return loss

    for _ in range(STEPS):
        for p in regression.model.parameters():
            p.grad = torch.full_like(p, 7.0)
        regression.optimizer.step(closure)

    assert same(regression.weights(), sequential(lambda each, step: each.backward(step)))


def test_a_parameter_that_the_closure_does_not_train_may_stay_uncleared() -> None:
    """It has no gradient, neither before nor behind the closure."""
    torch.manual_seed(0)
    model, unused = nn.Linear(3, 1), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    optimizer = ParallelPicardOptimizer(base, window=3)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.randn(4, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(unused, torch.ones(2))
    unused.grad = torch.ones(2)
    with pytest.raises(ImpureClosureError, match=r"parameter 2 has a gradient in \.grad"):
        optimizer.step(closure)


def test_a_closure_that_only_returns_a_loss_is_refused_by_name() -> None:
    """Legal in torch: the gradients were made before."""
    regression = Regression()
    regression.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) without a closure"):
        regression.optimizer.step(lambda: regression.loss(0).detach())


# -- what it returns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned:
    loss: Tensor
    parts: dict[str, Tensor]
    name: str = "kept"


@dataclass(slots=True)
class Slotted:
    loss: Tensor
    parts: dict[str, Tensor]
    name: str = "kept"


@dataclass
class Nested:
    inside: Returned | Slotted


@pytest.mark.parametrize("kind", [Returned, Slotted])
def test_a_dataclass_in_a_dataclass_keeps_no_graph(kind: Any) -> None:
    regression = Regression()

    def closure(step: int) -> Nested:
        loss = regression.backward(step)
        return Nested(kind(loss, {"half": loss / 2}))

    for _ in range(4):
        inside = regression.optimizer.step(closure).inside
        assert type(inside) is kind
        assert inside.loss.grad_fn is None
        assert inside.parts["half"].grad_fn is None
        assert inside.name == "kept"


@pytest.mark.parametrize("kind", [Returned, Slotted])
def test_a_dataclass_keeps_no_graph(kind: Any) -> None:
    regression = Regression()

    def closure(step: int) -> Any:
        regression.base.zero_grad()
        loss = regression.loss(step)
        loss.backward()
        return kind(loss, {"half": loss / 2})

    returned = [regression.optimizer.step(closure) for _ in range(4)]
    for each in returned:
        assert type(each) is kind
        assert each.name == "kept"
        assert each.loss.grad_fn is None
        assert each.parts["half"].grad_fn is None
        assert torch.equal(each.parts["half"], each.loss / 2)


# -- its life ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
def test_an_optimizer_is_freed_with_its_last_reference(window: int) -> None:
    """No reference leads back to it: no collector is needed, and memory does not grow with its makings."""
    gc.disable()
    try:
        regression = Regression(window)
        for _ in range(4):
            regression.optimizer.step(regression.backward)
        dead = weakref.ref(regression.optimizer)
        speculator = weakref.ref(regression.optimizer._speculator)
        del regression.optimizer
        assert dead() is None
        assert speculator() is None
    finally:
        gc.enable()


def test_two_optimizers_that_train_each_others_network_are_told_so() -> None:
    """A GAN with two wrappers: right at any tolerance, but nothing runs ahead; the remedy is named."""
    torch.manual_seed(0)
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    bases = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    wrapped = [ParallelPicardOptimizer(base, window=3, tolerance=float("inf")) for base in bases]

    def closure_of(index: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            bases[index].zero_grad()
            x = torch.randn(4, 2)
            loss = nets[0](nets[1](x)).square().mean() * (1 if index else -1)
            loss.backward()
            return loss

        return closure

    closures = [closure_of(0), closure_of(1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            for optimizer, closure in zip(wrapped, closures, strict=True):
                optimizer.step(closure)
    texts = [str(each.message) for each in caught]
    assert any("another ParallelPicardOptimizer" in text and "[a, b]" in text for text in texts), (
        texts
    )
    torch.manual_seed(0)
    plain = [nn.Linear(2, 2), nn.Linear(2, 2)]
    bases, nets[:] = [torch.optim.SGD(net.parameters(), lr=0.1) for net in plain], plain
    for step, index in itertools.product(range(6), range(2)):
        with step_rng(0, step):
            closures[index]()
            bases[index].step()
    for optimizer, net in zip(wrapped, plain, strict=True):
        for a, b in zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("window", [1, 4])
def test_clearing_in_place_gives_no_gradient_to_a_parameter_without_one(window: int) -> None:
    """Zeros in place of None would let weight decay move it, and would fail the check of purity."""
    used, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([used, unused], lr=0.1, weight_decay=0.1)
    optimizer = ParallelPicardOptimizer(base, window=window, tolerance=0)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = used.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
        assert unused.grad is None
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("window", [1, 4])
def test_a_closure_may_refuse_gradients_that_are_not_finite(window: int) -> None:
    """The test gradients that it adds to must not end a run whose loop clears the true ones."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1), window=window)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
        return loss

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
    with pytest.raises(ImpureClosureError, match="adds to it"):
        optimizer.step(closure)
    assert optimizer.step_index == 3


def test_an_error_before_the_gradients_are_cleared_is_the_closures_own() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([parameter], lr=0.1), window=4)

    def closure() -> Tensor:
        raise LookupError("no batch")

    for _ in range(2):
        with pytest.raises(LookupError, match="no batch"):
            optimizer.step(closure)
    assert torch.equal(parameter, torch.ones(3))


def test_closures_that_take_turns_are_each_tested_once() -> None:
    """A closure that does not clear costs a second evaluation, once: not at every sweep."""
    regression, calls = Regression(1), [0, 0]

    def first(step: int) -> Tensor:
        calls[0] += 1
        loss = regression.loss(step)
        loss.backward()
        return loss

    def second(step: int) -> Tensor:
        calls[1] += 1
        loss = 2 * regression.loss(step)
        loss.backward()
        return loss

    for turn in range(10):
        regression.optimizer.zero_grad()
        regression.optimizer.step((first, second)[turn % 2])
    assert calls == [6, 6]


@pytest.mark.parametrize("audit", ["auto", "never"])
def test_autocast_around_step_sees_every_slots_own_values(audit: str) -> None:
    """Its cache of cast weights is keyed by tensor; the values of the tensors differ by slot."""

    def run(window: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = ParallelPicardOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), window=window, tolerance=0, audit=audit
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 4)).float().sum()  # the same gradient everywhere
            loss.backward()
            return loss

        losses = []
        for _ in range(12):
            with torch.autocast("cpu"):
                losses.append(optimizer.step(closure))
        return model.weight.detach().clone(), losses

    assert_same_bits(run(4), run(1))


class Weighted:
    """A network, and a weight of its loss that an optimizer of its own trains."""

    def __init__(self, window: int = 3) -> None:
        torch.manual_seed(0)
        self.net, self.weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(()))
        base = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer = ParallelPicardOptimizer(base, window=window, tolerance=float("inf"))
        self.other = torch.optim.SGD([self.weight], lr=0.1)

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.net(torch.randn(4, 2)).square().mean() * torch.exp(-self.weight) + self.weight
        loss.backward()
        return loss


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_another_optimizer_cannot_step_on_gradients_of_the_future(kind: str) -> None:
    case = Weighted()

    def closure(step: int) -> Any:
        case.other.zero_grad()
        loss = case.loss()
        return {"loss": loss} if kind == "dict" else loss

    case.optimizer.step(closure)
    before = case.weight.detach().clone()
    with pytest.raises(ImpureClosureError, match=r"SGD.*parameter 0 .*\[a, b\]"):
        case.other.step()
    assert torch.equal(case.weight, before)
    assert case.optimizer.step_index == 1


def test_gradients_of_modules_that_ran_are_found_without_a_loss() -> None:
    case = Weighted()
    outside = nn.Linear(2, 2)
    other = torch.optim.SGD(outside.parameters(), lr=0.1)

    def closure(step: int) -> float:
        case.optimizer.zero_grad()
        loss = outside(case.net(torch.randn(4, 2))).square().mean()
        loss.backward()
        return loss.item()

    case.optimizer.step(closure)
    with pytest.raises(ImpureClosureError, match="may belong to another step"):
        other.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_another_optimizer_may_step_on_gradients_of_its_own(set_to_none: bool) -> None:
    """As in a GAN: what the closure left in the other network is cleared first."""
    case = Weighted()
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PicardWarning)
            case.optimizer.step(case.loss)
        case.other.zero_grad(set_to_none)
        (case.weight - 1).square().backward()
        case.other.step()
        case.other.step(lambda: case.other.zero_grad(set_to_none))
    assert 0 < case.weight < 1


def test_another_optimizer_may_step_where_nothing_runs_ahead() -> None:
    case = Weighted(window=1)
    for _ in range(3):
        case.other.zero_grad()
        case.optimizer.step(case.loss)
        case.other.step()
    assert case.weight < 0


@pytest.mark.parametrize("call", ["step", "step(closure)", "flush"])
def test_a_closure_that_takes_its_own_step_is_told_so(call: str) -> None:
    """Nothing has moved then, and the optimizer goes on with a closure that does not."""
    case = Weighted()

    def closure() -> Tensor:
        loss = case.loss()
        if call == "flush":
            case.optimizer.flush()
        else:
            case.optimizer.step(*[case.loss][: call != "step"])
        return loss

    before = case.net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"called step\(\) or flush\(\) of its own optimizer"):
        case.optimizer.step(closure)
    assert torch.equal(case.net.weight, before)
    assert case.optimizer.step_index == case.optimizer.stats.steps == 0
    case.optimizer.step(case.loss)
    assert case.optimizer.step_index == 1


def test_inference_mode_is_refused_and_leaves_nothing_behind() -> None:
    case = Weighted()
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            case.optimizer.step(case.loss)
        case.optimizer.flush()
        case.optimizer.step(case.loss)
    assert case.optimizer.step_index == 2


class Transposed:
    """Sets a gradient that lies in memory column by column, as `torch.autograd.grad` may return it."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(37, 53))
        self.base = make([self.weight])

    def closure(self, step: int) -> Tensor:
        drawn = torch.randn(53, 64) @ torch.randn(64, 37)
        self.weight.grad = (drawn + self.weight.detach().sign().t()).t()
        return drawn.sum()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.Adafactor, lr=1e-4),
        functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9, fused=True),
        functools.partial(torch.optim.Adam, lr=1e-4),
    ],
    ids=["Adafactor", "fused SGD", "Adam"],
)
def test_a_gradient_keeps_its_order_in_memory(make: Any) -> None:
    plain, ahead = Transposed(make), Transposed(make)
    optimizer = ParallelPicardOptimizer(ahead.base, window=3, tolerance=0)
    for step in range(8):
        with step_rng(0, step):
            plain.closure(step)
            plain.base.step()
        optimizer.step(ahead.closure)
        assert_same_bits(ahead.weight, plain.weight)
        for key, value in plain.base.state[plain.weight].items():
            assert_same_bits(ahead.base.state[ahead.weight][key], value)
        assert ahead.weight.grad is not None
        assert ahead.weight.grad.stride() == (1, 37)
    assert optimizer.stats.sweeps < 8


@pytest.mark.parametrize("where", ["cell", "attribute"])
def test_an_average_of_weights_that_the_closure_updates_is_named(where: str) -> None:
    """Evaluated ahead, and more than once per step, it would average guesses."""
    case = Weighted()
    average = torch.optim.swa_utils.AveragedModel(case.net)
    if where == "attribute":
        case.average = average  # type: ignore[attr-defined]

    def in_a_cell(step: int) -> Tensor:
        loss = case.loss()
        average.update_parameters(case.net)
        return loss

    def in_an_attribute(step: int) -> Tensor:
        loss = case.loss()
        case.average.update_parameters(case.net)  # type: ignore[attr-defined]
        return loss

    with pytest.raises(ImpureClosureError, match=r"AveragedModel\.module\.weight.*after step"):
        case.optimizer.step(in_a_cell if where == "cell" else in_an_attribute)
    assert case.optimizer.step_index == 0


def test_an_average_of_weights_that_the_loop_updates_is_fine() -> None:
    case = Weighted()
    average = torch.optim.swa_utils.AveragedModel(case.net)

    def closure(step: int) -> Tensor:
        assert average is not None
        return case.loss()

    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PicardWarning)
            case.optimizer.step(closure)
        average.update_parameters(case.net)
    assert average.n_averaged == 4
