"""One thread a process, and one worker pool per world size for the whole session."""

import signal
import threading
from collections.abc import Iterator

import hypothesis
import hypothesis.database
import pytest
import torch

from tests.helpers.leaks import nothing_is_left, seed
from tests.helpers.pool import Pool, Pools

# Ignored in what a script starts in the background, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither a deadline nor a health check of seconds: on a crowded machine both fail by chance.
hypothesis.settings.register_profile(
    "picardopt",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
    max_examples=60,
    print_blob=True,
)
# `make nightly` (--hypothesis-profile=nightly): other examples each time; what failed once is kept and tried first.
hypothesis.settings.register_profile(
    "nightly",
    hypothesis.settings.get_profile("picardopt"),
    derandomize=False,
    max_examples=300,
    database=hypothesis.database.DirectoryBasedExampleDatabase(".hypothesis/examples"),
)
hypothesis.settings.load_profile("picardopt")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same, with its fixtures, whichever ran before it and whichever run alone."""
    seed(0)


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """A test that leaves something behind fails itself, not the one that stumbles over it."""
    with nothing_is_left():
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Law 1 is bitwise for the same number of threads a process; workers have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """``pools(n)`` is the session's pool of n real gloo processes."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(
    params=[2, pytest.param(3, marks=pytest.mark.slow), 4], ids=lambda n: f"{n}-processes"
)
def pool(request: pytest.FixtureRequest, pools: Pools) -> Pool:
    """The session's pool, once for each world size; two of them in the daily suite."""
    return pools(request.param)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Not even one that the end of the interpreter would not wait for."""
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """The test starts without what another one told accelerate, and leaves nothing there."""
    from tests.helpers.accelerated import forget  # not everywhere installed

    forget()
    yield
    forget()
