"""Checks that the closure is a function of (parameters, step), which running ahead depends on.

The most common misuse is ``batch = next(it)`` before ``step(closure)``: the whole window would see one batch. Three
checks find it: the closure's variables are compared at every step, a drift that was evaluated ahead is evaluated again
later with the closure of its own call, and buffers that a closure changes are found at once.
"""

from picardopt.audit.schedule import Audit

__all__ = ["Audit"]
