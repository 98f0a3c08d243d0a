"""Embeddings of texts, kept on disk, by an encoder that is in memory only while it is needed."""

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
"""Texts to embeddings, [texts, tokens, channels]."""

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class TextEmbeddings:
    """Embeds texts, each only once: embeddings are kept, in memory and on disk.

    Args:
        load: Loads the text encoder and returns a function that encodes with it. Called when a text is not known yet;
            the function is dropped right afterwards, and the encoder with it.
        key: Identifies the encoder: embeddings with another key are not used.
        folder: Where embeddings are kept; None keeps them in memory alone, and so does, with a warning, a folder that
            cannot be written to.
        device: Where embeddings are put.
        context: How much of a text the encoder reads.
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
        """Returns the embeddings of texts. [texts, tokens, channels]."""
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
        gc.collect()  # modules are in cycles; a T5 encoder must not wait for the next collection
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
            return None  # there is none, or whatever happened to the file: it is written anew

    def _write(self, text: str, embedding: Tensor) -> None:
        path = self._path(text)
        if path is None or not self._writable:
            return
        metadata = {"text": text, "encoder": self._key}
        try:
            with replacing(path) as temporary:
                save_file({"embedding": embedding.detach().cpu().contiguous()}, temporary, metadata)
        except (SafetensorError, OSError) as error:  # save_file makes the first of the second
            self._writable = False
            warnings.warn(
                f"embeddings of prompts cannot be kept in {self._folder} ({error}), so that every process loads the "
                f"text encoder anew: set ModelOptions.embeddings to a folder that can be written, or to None",
                stacklevel=2,
            )


def identity(folder: Path, parts: Sequence[str]) -> str:
    """Returns a name for some parts of a pipeline's folder that changes when their content does.

    A snapshot of the hub is named by its commit. In other folders the files' names, sizes and samples of their bytes
    (all bytes of a small file) make the name: an encoder of 10 GB is not worth reading twice for it.

    Args:
        folder: The pipeline's.
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
