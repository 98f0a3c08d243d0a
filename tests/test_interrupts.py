"""Ctrl-C at any line of a step leaves everything at the last commit."""

import signal
import sys
import threading

import pytest
import torch

import picardopt
from picardopt import ParallelPicardOptimizer
from picardopt.interrupts import interrupts_allowed, interrupts_deferred


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_passes_where_it_is_allowed():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred(), interrupts_allowed():
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    assert not done


def test_one_that_waits_passes_at_the_next_allowed_place():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        with interrupts_allowed():
            done.append("not reached")
    assert done == ["first"]


def test_a_handler_of_the_users_own_is_called():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_all_that_wait_are_called_whatever_the_first_one_raises():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_without_a_handler_is_left_alone():
    with interrupts_deferred():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_a_handler_that_the_block_installs_stays():
    def own(number, frame):
        return None

    before = signal.getsignal(signal.SIGINT)
    try:
        with interrupts_deferred(), interrupts_allowed():
            signal.signal(signal.SIGINT, own)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_while_handlers_are_put_back_does_no_harm(monkeypatch):
    """The first handler that is put back is called at once and raises: ours may stay in the others' place."""
    seen, real = [], signal.signal
    real(signal.SIGTERM, lambda number, frame: seen.append(number))

    def interrupted(number, handler):
        done = real(number, handler)
        if number == signal.SIGINT and handler is signal.default_int_handler:
            raise KeyboardInterrupt
        return done

    try:
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            monkeypatch.setattr(signal, "signal", interrupted)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]  # passed on at once: no block is active
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            assert len(seen) == 1
        assert len(seen) == 2
        assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
    finally:
        real(signal.SIGTERM, signal.SIG_DFL)
        real(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_left_alone():
    passed = []

    def work():
        with interrupts_deferred(), interrupts_allowed():
            passed.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [signal.default_int_handler]


class Interrupter:
    """Raises a signal at the n-th line that is executed inside picardopt."""

    def __init__(self, at, number=signal.SIGINT):
        self.at, self.count, self.number = at, 0, number
        self.folder = picardopt.__path__[0]

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                signal.raise_signal(self.number)
        return self


def make():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    base = torch.optim.Adam([weight], lr=0.1)
    optimizer = ParallelPicardOptimizer(base, window=3, tolerance=0, seed=1)

    def closure():
        weight.grad = None
        loss = (weight * torch.randn(5)).sum()
        loss.backward()
        return loss

    return weight, optimizer, closure


def run(optimizer, closure, until):
    while optimizer.step_index < until:
        optimizer.step(closure)


@pytest.mark.parametrize("every", [37, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", [0, 1])
def test_at_any_line_everything_is_at_the_last_commit(start, every):
    expected = []
    weight, optimizer, closure = make()
    for _ in range(8):
        expected.append(weight.detach().clone())
        optimizer.step(closure)
    lines = Interrupter(-1)
    weight, optimizer, closure = make()
    run(optimizer, closure, start)
    sys.settrace(lines)
    optimizer.step(closure)
    sys.settrace(None)
    assert lines.count > 50
    hit = 0
    for at in range(1, lines.count + 1, every):
        weight, optimizer, closure = make()
        run(optimizer, closure, start)
        generators = torch.get_rng_state()
        sys.settrace(Interrupter(at))
        try:
            optimizer.step(closure)
        except KeyboardInterrupt:
            hit += 1
        finally:
            sys.settrace(None)
        assert torch.equal(torch.get_rng_state(), generators), at
        assert torch.equal(weight.detach(), expected[optimizer.step_index]), at
        run(optimizer, closure, 7)
        assert torch.equal(weight.detach(), expected[7]), at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert hit > 10


class PreemptedError(Exception):
    """What a program's handler of SIGTERM may raise: an ordinary exception."""


@pytest.fixture
def preemptible():
    def leave(number, frame):
        raise PreemptedError

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_at_any_line(preemptible):
    """Its handler's exception is never taken for one of the closure's, and finds the last commit."""
    expected = []
    weight, optimizer, closure = make()
    for _ in range(8):
        expected.append(weight.detach().clone())
        optimizer.step(closure)
    for at in range(1, 100_000, 71):
        weight, optimizer, closure = make()
        interrupter = Interrupter(at, signal.SIGTERM)
        sys.settrace(interrupter)
        try:
            optimizer.step(closure)
        except PreemptedError:
            pass
        else:
            assert interrupter.count < at
            break
        finally:
            sys.settrace(None)
        assert torch.equal(weight.detach(), expected[optimizer.step_index]), at
        run(optimizer, closure, 7)
        assert torch.equal(weight.detach(), expected[7]), at
    assert at > 400


def test_ctrl_c_at_any_line_of_the_delay_itself_puts_the_handlers_back():
    """Whichever signals were delayed."""
    for at in range(1, 1000):
        interrupter = Interrupter(at)
        sys.settrace(interrupter)
        try:
            with interrupts_deferred():
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, at
        if interrupter.count < at:
            break
    assert at > 20


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_what_a_handler_raises_in_the_closure_is_for_the_program(preemptible, slot):
    """At a guess too, where the closure's own exceptions only shorten the stride."""
    weight, optimizer, closure = make()
    run(optimizer, closure, 7)
    expected = weight.detach().clone()
    weight, optimizer, closure = make()
    evaluations = []

    def preempted():
        evaluations.append(None)
        if len(evaluations) == slot + 1:
            signal.raise_signal(signal.SIGTERM)
        return closure()

    before = weight.detach().clone()
    with pytest.raises(PreemptedError):
        optimizer.step(preempted)
    assert optimizer.step_index == optimizer.stats.failed_speculations == 0
    assert torch.equal(weight.detach(), before)
    run(optimizer, closure, 7)
    assert torch.equal(weight.detach(), expected)


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_of_the_base_that_raises_undoes_the_step(when, bases):
    """The step can be taken again, bitwise: nothing of the one that failed is left."""

    def made():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
        inner = [torch.optim.Adam(weights, lr=0.1)]
        if bases == 2:
            inner = [torch.optim.Adam([w], lr=0.1) for w in weights]
        optimizer = ParallelPicardOptimizer(inner, window=3, tolerance=0, seed=1)

        def closure():
            optimizer.zero_grad()
            loss = sum((w * torch.randn(5)).sum() for w in weights)
            loss.backward()
            return loss

        return weights, inner, optimizer, closure

    weights, _, optimizer, closure = made()
    run(optimizer, closure, 8)
    expected = [w.detach().clone() for w in weights]
    weights, inner, optimizer, closure = made()
    calls = []

    def hook(*_):
        calls.append(optimizer.step_index)
        if len(calls) in (1, 4, 6):
            raise ValueError("planted")

    # Of two optimizers the first has stepped already when the second one's hook raises.
    getattr(inner[-1], f"register_step_{when}_hook")(hook)
    failed = 0
    while optimizer.step_index < 8:
        before = [w.detach().clone() for w in weights]
        try:
            optimizer.step(closure)
        except ValueError:
            failed += 1
            assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
            steps = [int(s["step"]) for base in inner for s in base.state.values() if s]
            assert set(steps) <= {optimizer.step_index}
    assert failed == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
