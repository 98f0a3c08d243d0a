"""Atomic, checksummed, weights-only checkpoint files.

A flipped bit in tensor data loads silently with ``torch.load``, so the file carries its own checksum; a
half-written file never has the final name. A file is a short header (magic, version, length, SHA-256)
and a ``torch.save`` payload that is read with ``weights_only=True``: loading never runs code from it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from picardopt.errors import CheckpointError

_MAGIC = b"picardopt-ckpt\n"
_VERSION = 1
_HEADER = struct.Struct(f"<{len(_MAGIC)}sIQ32s")


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that the file is either the old one or the whole new one.

    Under several ranks call it on one of them: the committed state is the same on all.

    Args:
        path: The file; its folder must exist.
        state: Tensors, numbers, strings and containers of them, for instance
            ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``.

    Raises:
        CheckpointError: If the file cannot be written (folder missing or not writable, disk full), or if
            the state holds objects that a weights-only file cannot; the old file is untouched.
    """
    target = Path(path)
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
    except Exception as error:
        raise CheckpointError(f"the state for {target} cannot be saved: {error}") from error
    payload = buffer.getbuffer()
    _load_payload(target, payload)  # an unreadable file must not replace a good one
    header = _HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest())
    temporary = _temporary(target)
    try:
        _remove_leftovers(target)
        with open(temporary, "wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} could not be written ({error}); an older file there is untouched: free space, or "
            "give a folder that exists and can be written"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint whole, or not at all.

    Args:
        path: A file written by `save_checkpoint`.

    Returns:
        The state, tensors on the CPU.

    Raises:
        CheckpointError: If the file is missing, cut short, damaged, of another kind or version, or holds
            anything but data. Nothing was loaded anywhere.
    """
    target = Path(path)
    try:
        data = target.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {target} cannot be read: {error}") from error
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise CheckpointError(
            f"{target} is not a picardopt checkpoint, or was cut short: {_REMEDY}"
        )
    _, version, length, digest = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise CheckpointError(
            f"{target} has format version {version}, this picardopt reads {_VERSION}: load it with the version "
            "that wrote it"
        )
    payload = memoryview(data)[_HEADER.size :]
    if len(payload) != length:
        raise CheckpointError(f"{target} holds {len(payload)} of {length} bytes: {_REMEDY}")
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{target} is damaged (its checksum does not match): {_REMEDY}")
    return _load_payload(target, payload)


_REMEDY = "use an older checkpoint"


def _load_payload(target: Path, payload: memoryview) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(payload), map_location="cpu", weights_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"{target} holds something other than tensors, numbers, strings and containers of them: {error}"
        ) from error
    return state


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    """Returns a name in the target's folder that no other thread, process or host is using."""
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return target.with_name(f".{target.name}.{writer}.tmp")


def _remove_leftovers(target: Path) -> None:
    """Removes temporary files of killed processes of this host that were writing this target."""
    start = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.glob(f"{glob.escape(start)}*.tmp"):
        owner = path.name.removeprefix(start).split(".")[0]
        if owner.isdecimal() and not _runs(int(owner)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
