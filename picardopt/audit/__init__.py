"""Is the closure a function of (parameters, step)? Running ahead is only right if it is.

The commonest misuse is ``batch = next(it)`` before ``step(closure)``: the whole window would see one batch. It shows in
what the closure can see, and when a drift that was evaluated ahead is evaluated again, later, with the closure of its
own call; buffers that a closure changes show at once.
"""

from picardopt.audit.schedule import Audit

__all__ = ["Audit"]
