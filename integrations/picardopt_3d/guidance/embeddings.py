"""Embeddings of texts, stored on disk, by an encoder that is in memory only while it is needed."""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from picardopt_3d.guidance.text_context import TextContext
from picardopt_3d.io import replacing

Encode = Callable[[Sequence[str]], Tensor]
"""Maps texts to embeddings, `[texts, tokens, channels]`."""

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class TextEmbeddings:
    """Embeds texts, each only once: embeddings are stored in memory and on disk.

    Args:
        load: Loads the text encoder and returns a function that encodes with it. It is called for a new text; the
            function, and with it the encoder, is released right afterwards.
        key: Identifies the encoder: embeddings with another key are not used.
        folder: Folder of the stored embeddings; None stores them in memory alone, and so does, with a warning, a folder
            that cannot be written to.
        device: Device of the embeddings.
        context: The number of tokens that the encoder reads.
    """

    def __init__(
        self,
        load: Callable[[], Encode],
        key: str,
        folder: Path | None,
        device: torch.device,
        context: TextContext,
    ) -> None:
        self._load, self._key, self._device, self.context = load, key, device, context
        self._folder = None if folder is None else folder.expanduser()
        self._known: dict[str, Tensor] = {}
        self._writable = True

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings of texts, `[texts, tokens, channels]`."""
        for text in texts:
            if text not in self._known and (kept := self._read(text)) is not None:
                self._known[text] = kept.to(self._device)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._embed(new)
        return torch.stack([self._known[text] for text in texts])

    def _embed(self, texts: Sequence[str]) -> None:
        encode = self._load()
        with torch.no_grad():
            embeddings = encode(texts)
        del encode
        gc.collect()  # modules form reference cycles, and a T5 encoder must not stay until the next collection
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        for text, embedding in zip(texts, embeddings, strict=True):
            self._known[text] = embedding.detach().to(self._device, copy=True)
            self._write(text, embedding)

    def _path(self, text: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps([self._key, text]).encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        path = self._path(text)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                embedding: Tensor = file.get_tensor("embedding")
                return embedding
        except (SafetensorError, OSError):
            return None  # missing or damaged: the file is written anew

    def _write(self, text: str, embedding: Tensor) -> None:
        path = self._path(text)
        if path is None or not self._writable:
            return
        metadata = {"text": text, "encoder": self._key}
        try:
            with replacing(path) as temporary:
                save_file({"embedding": embedding.detach().cpu().contiguous()}, temporary, metadata)
        except (SafetensorError, OSError) as error:  # save_file turns the second into the first
            self._writable = False
            warnings.warn(
                f"embeddings of prompts cannot be stored in {self._folder} ({error}), so that every process loads the "
                f"text encoder anew: set ModelOptions.embeddings to a folder that can be written, or to None",
                stacklevel=2,
            )


def identity(folder: Path, parts: Sequence[str]) -> str:
    """Returns a name for some parts of a pipeline's folder that changes with their content.

    For a snapshot of the hub the name holds the commit. For other folders it is a hash of the files' names, sizes and
    samples of their bytes (all bytes of a small file), because reading all of an encoder of 10 GB would be slow.

    Args:
        folder: Folder of the pipeline.
        parts: Names of its subfolders.
    """
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return f"{folder.parent.parent.name}@{folder.name}"
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            with path.open("rb") as file:
                stride = max(_SAMPLE_BYTES, size // _SAMPLES)
                for offset in range(0, size, stride):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
