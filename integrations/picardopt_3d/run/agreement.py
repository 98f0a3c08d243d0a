"""What the workers of a run do alike: they raise each other's errors, and begin a stage with the same scene."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from picardopt_3d.methods import Stage


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises an error of one worker in all of them, so that none waits for the other.

    Raises:
        ValueError, OSError: A user error of this worker or of another one.
        RuntimeError: Another worker has failed otherwise.
        Exception: This worker has.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found = own
    if dist.is_initialized():
        everyones: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, None if own is None else _sendable(own))
        found = own or next(filter(None, everyones), None)
    if found is not None:
        raise found


def _sendable(error: Exception) -> Exception:
    """Returns what the other workers raise for an error of this one; of a class that every process can make again."""
    for kind in (FileNotFoundError, PermissionError, OSError, ValueError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"worker {dist.get_rank()} failed: {error!r}")


def check_same_scene(stage: Stage) -> None:
    """Checks that every worker has made the same scene, up to what the optimizer sends from the first one to all.

    That is what is trained, and the carry: of these the shapes must agree, of the rest every bit.

    Args:
        stage: The stage that each worker has built.

    Raises:
        ValueError: The scenes differ; on all ranks alike.
    """
    if not dist.is_initialized():
        return
    carry = stage.carry()
    sent = {id(tensor) for tensor in ([] if carry is None else carry.present())}
    for optimizer in stage.optimizers():
        sent |= {id(each) for group in optimizer.param_groups for each in group["params"]}
    named = [*stage.scene.named_parameters(), *stage.scene.named_buffers()]
    own = {name: _digest(tensor, id(tensor) not in sent) for name, tensor in named}
    everyones: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    names = dict.fromkeys(name for each in everyones for name in each)
    different = [name for name in names if len({each.get(name) for each in everyones}) > 1]
    if different:
        raise ValueError(
            f"the workers have made different scenes, which differ in {', '.join(different)}: let all of them compute "
            "on devices of the same kind, or take one (--workers 1)"
        )


def _digest(tensor: Tensor, bits: bool) -> str:
    """Returns a hash of a tensor's shape and type, and of its bits if they are asked for."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    if bits:
        flat = tensor.detach().contiguous().reshape(-1).cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
