"""What a closure can see besides its parameters and step, compared from one call of ``step`` to the next.

What the loop changes between two steps (a loss weight, a target network, ``train()`` / ``eval()``) is legal: the next
step sees it. Drifts that were evaluated ahead have not seen it, so their queue must go.

Seen, and named when it changes:

- the closure's code, through ``functools.partial``, bound methods, callable objects and decorators;
- plain values (numbers, strings, bytes, flags, None, tuples of them) in its cells, in the globals that its code names,
  in its defaults and its own attributes; the same of functions of your own that it names, and of methods that it names
  of objects that it captures (64 functions at most);
- one level of attributes of objects that it captures (``self.weight``), and of dataclasses and namespaces among them
  (``self.config.weight``); attributes that the code names of imported modules and of your own classes;
- lists, tuples, dicts, sets and deques of up to 64 items, nested up to four deep; of longer ones which one it is, the
  length and both ends;
- tensors: which one it is, writes in place (``_version``), ``requires_grad``; NumPy arrays: which one it is, and the
  content of those of up to 4 KiB;
- torch modules that it captures or that ran in it, with all their submodules: ``training``, attributes (``dropout.p``),
  replaced children, parameters and buffers (as tensors above).

Not seen; call ``optimizer.flush()`` after changing it between two steps:

- writes through ``tensor.data`` (``target.data.copy_(source)``; under ``torch.no_grad()``, without ``.data``, they are
  seen), through a NumPy view of a tensor, by a CUDA graph, or by your own code in C;
- what lies deeper (``self.trainer.config.weight``), class attributes behind an object, globals of installed libraries;
- larger NumPy arrays written in place, and items in the middle of longer containers;
- files, iterators (``next(batches)`` in the loop), random generators of your own, other state in C.

The optimizer's own business (its parameters, the carry, optimizers, LR schedulers, ``.grad``) is left out. Nothing of
yours runs for it: no property, ``__getattr__`` or ``__eq__``. It keeps alive no object that can have weak references.
"""

from picardopt.audit.surroundings.policy import OFTEN, Drop, Keep, OuterChanges, Recheck, Verdict
from picardopt.audit.surroundings.watch import Surroundings

__all__ = ["OFTEN", "Drop", "Keep", "OuterChanges", "Recheck", "Surroundings", "Verdict"]
