"""One thread a process, and one worker pool per world size for the whole session."""

import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.helpers.pool import Pool, Pools

# Ignored in what a script starts in the background, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "picardopt", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("picardopt")


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


@pytest.fixture(params=[2, 3, 4], ids=lambda n: f"{n}-processes")
def pool(request: pytest.FixtureRequest, pools: Pools) -> Pool:
    """The session's pool, once for each world size."""
    return pools(request.param)
