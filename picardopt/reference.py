"""Algorithm 2 of DreamPropeller in plain lines.

`tests/test_reference.py` tests it against the theorem; `tests/test_paper_rule.py` tests the optimizer against it: the
same strides, residuals and thresholds under the paper's rule. Exactness is tested against the plain sequential loop.

Written to be read against the paper (arXiv 2311.17082, supplement B), with its names: ``s`` the
drift, ``h`` one step of the optimizer, ``p`` the window, ``e`` the threshold, ``k`` the sweep.
Where print and the published code disagree, it reads as follows:

- the window holds iterates ``tau .. tau+p``, p+1 of them; the last is compared, never evaluated;
- slot j uses the randomness of step ``tau+j`` (the print seeds all of them with ``tau``): ``s`` is
  handed that number, and seeding with it is "the seed for time step tau is tau";
- residual j compares iterate ``tau+j`` before and after the sweep, j = 1..p;
- ``skip`` is the first j whose residual is not ``<= e``, else p: ``tau+skip`` was made from drifts
  whose guesses 1..skip-1 all passed, so it is safe although it did not pass itself;
- ``e`` changes after ``skip`` is chosen, and the last residual enters it like the others; a
  residual that is not finite is never accepted and never enters ``e``;
- ``p`` is the number of drifts per sweep (the print's n-1 keeps one device as a master).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Generic, TypeVar

State = TypeVar("State")
Drift = TypeVar("Drift")


@dataclass(frozen=True)
class Sweep(Generic[State]):
    """One pass of the while loop, as it was before ``tau``, ``e`` and ``p`` moved on."""

    tau: int
    """Step index of the head."""
    guesses: tuple[State, ...]
    """Iterates ``tau .. tau+p`` before the sweep, p+1 of them."""
    iterates: tuple[State, ...]
    """Iterates ``tau .. tau+p`` after the sweep."""
    error: tuple[float, ...]
    """Residuals 1..p: squared distance per parameter between guess and iterate."""
    e: float
    """The threshold that these residuals met."""
    skip: int
    """Number of steps that the sweep made final, 1..p."""


@dataclass(frozen=True)
class Solution(Generic[State]):
    """The result of ``algorithm_2``: the last state, the trajectory and a record of each sweep."""

    theta: State
    """The state after T steps."""
    trajectory: tuple[State, ...]
    """The accepted states ``theta_0 .. theta_T``, T+1 of them."""
    sweeps: tuple[Sweep[State], ...]
    """One record a sweep; the paper's k is its index."""


def algorithm_2(
    s: Callable[[State, int], Drift],
    h: Callable[[Drift, State], State],
    theta: State,
    T: int,
    *,
    p: int,
    e: float,
    distance: Callable[[State, State], float],
    gamma: float = 1.0,
    M: Callable[[Sequence[float]], float] = median,
    same: Callable[[State, State], bool] | None = None,
) -> Solution[State]:
    """Runs T steps of ``theta = h(s(theta, t), theta)``, p of them at a time.

    Args:
        s: The drift of step t at a state; must depend on nothing else. The only parallel part.
        h: One sequential step; must return a new state and leave the old one alone.
        theta: The first state; any type, with whatever ``h`` needs (moments, counters) inside it.
        T: Number of steps.
        p: Window: drifts per sweep, at least 1.
        e: Initial threshold on the squared distance per parameter.
        distance: ``d(a, b)**2 / D`` of two states.
        gamma: The update of ``e``; 1 keeps it fixed.
        M: Aggregation of the residuals into ``e``; a median of an even count is the mean of the middle two.
        same: If given, a guess is accepted if ``same(guess, iterate)`` instead of by ``e``: the
            exact mode, since squares of tiny differences underflow to 0.

    Returns:
        The last state, the accepted trajectory and a record of every sweep.
    """
    # tau, k, p <- 0, 0, n - 1; theta_i^0 <- theta for all i
    tau, p = 0, min(p, T)
    window = [theta] * (p + 1)
    trajectory, sweeps = [theta], list[Sweep[State]]()
    while tau < T:
        # Dispatch {theta_{tau+j}^k} for j = 0..p-1 and gather {s(theta_{tau+j}^k)}
        drifts = [s(window[j], tau + j) for j in range(p)]
        # theta_{tau+j+1}^{k+1} <- h(s(theta_{tau+j}^k), ... h(s(theta_tau^k), theta_tau^k))
        rolled = [window[0]]
        for j in range(p):
            rolled.append(h(drifts[j], rolled[j]))
        # error <- {d(theta_{tau+j}^{k+1}, theta_{tau+j}^k)^2 / D} for j = 1..p
        error = [distance(rolled[j], window[j]) for j in range(1, p + 1)]
        # skip <- min({j : error_j > e} + {p}), "not <=" so that a NaN is beyond every threshold
        right = [x <= e for x in error] if same is None else list(map(same, window[1:], rolled[1:]))
        skip = min([j for j in range(1, p + 1) if not right[j - 1]] + [p])
        sweeps.append(Sweep(tau, tuple(window), tuple(rolled), tuple(error), e, skip))
        trajectory += rolled[1 : skip + 1]
        # theta_{tau+j}^{k+1} <- theta_{tau+p}^{k+1} for all j in [p, skip + p]
        window = rolled[skip:] + [rolled[p]] * skip
        # tau <- tau + skip, k <- k + 1
        tau = tau + skip
        # e <- gamma e + (1 - gamma) M(error)
        finite = [residual for residual in error if isfinite(residual)]
        e = gamma * e + (1 - gamma) * M(finite) if finite else e
        # p <- min(p, T - tau)
        p = min(p, T - tau)
        window = window[: p + 1]
    return Solution(window[0], tuple(trajectory), tuple(sweeps))
