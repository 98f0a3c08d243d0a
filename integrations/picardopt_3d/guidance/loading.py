"""Finds the parts of a pipeline in a folder or on the hub, loads them, and moves a UNet to its device.

A hub id is first resolved to the folder of its snapshot, which is then treated like any other folder. Every error names
its remedy.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from picardopt_3d.models import REMOVED, kind_of

Precision = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "model", "sequential"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Matches an owner and a name; "./folder" is a path."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and run.

    Attributes:
        dtype: Precision of the model; float16 and bfloat16 take half the memory and are usual on a GPU.
        variant: Variant of the weight files, as the hub names it ("fp16").
        revision: Commit, tag or branch of a hub model.
        attention_slicing: Whether to compute the UNet's attention in slices: less memory, slower.
        vae_slicing: Whether to encode one view at a time, and again for its gradient: less memory, slower.
        channels_last: Whether UNet and VAE use the channels-last memory format, faster on a GPU in half precision.
        offload: Keeps the UNet in main memory: "model" moves it to the device for each use, "sequential" layer by layer
            (least memory, slowest). The VAE stays on the device, because gradients flow through it.
        compile: Whether to compile the UNet with `torch.compile`; the first passes take minutes.
        joined_views: Most views of several steps in one pass (a step's own are never split); more take more memory.
        embeddings: Folder for the embeddings of prompts, so that the text encoder is loaded for new texts only; None
            stores them in memory alone.
    """

    dtype: Precision = "float32"
    variant: str | None = None
    revision: str | None = None
    attention_slicing: bool = False
    vae_slicing: bool = False
    channels_last: bool = True
    offload: Offload = "none"
    compile: bool = False
    joined_views: int = 8
    embeddings: Path | None = Path("~/.cache/picardopt/embeddings")

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A name is unknown, or two options exclude each other.
        """
        for name, known in (("dtype", get_args(Precision)), ("offload", get_args(Offload))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")
        if self.joined_views < 1:
            raise ValueError(f"joined_views={self.joined_views}: give a whole number of at least 1")
        if self.compile and self.offload != "none":
            raise ValueError(
                f"compile=True with offload={self.offload!r}: compiled code needs its weights on the device; "
                f"use only one of the two"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a type of torch."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def memory_advice(self) -> str:
        """Returns the options, not in use yet, that would save memory."""
        left = [
            'dtype="float16"' if self.dtype == "float32" else "",
            "" if self.attention_slicing else "attention_slicing=True",
            "" if self.vae_slicing else "vae_slicing=True (latent models)",
            ""
            if self.offload == "sequential" or self.compile
            else 'offload="model" or "sequential"',
            "" if self.joined_views == 1 else "joined_views=1 (several steps a worker)",
            "fewer or smaller views a step",
        ]
        return ", ".join(option for option in left if option)


def locate(
    source: str | Path, classes: Sequence[str], options: ModelOptions, without: Sequence[str] = ()
) -> Path:
    """Returns the folder of a pipeline, downloading it from the hub if necessary.

    Args:
        source: A folder in diffusers' layout, or a hub id "owner/name".
        classes: Names of the accepted pipeline classes.
        options: Revision and variant.
        without: Parts that are not needed and not downloaded.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: The pipeline is of another class.
    """
    read_index(source, classes, options)
    if Path(source).is_dir():
        return Path(source)
    from diffusers import DiffusionPipeline  # here: it takes seconds

    with explained(source):
        unneeded: dict[str, Any] = dict.fromkeys(without)
        return Path(
            DiffusionPipeline.download(
                source, revision=options.revision, variant=options.variant, **unneeded
            )
        )


def read_index(source: str | Path, classes: Sequence[str], options: ModelOptions) -> dict[str, Any]:
    """Returns the index of a pipeline, the only file that is downloaded.

    Args:
        source: See `locate`.
        classes: Names of the accepted pipeline classes.
        options: Revision.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: The pipeline is of another class.
    """
    if Path(source).is_dir():
        return _checked_index(Path(source), source, classes)
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"source={str(source)!r}: there is no such folder; give a folder that holds a model_index.json, or a hub "
            f"id such as 'owner/name'"
        )
    from huggingface_hub import hf_hub_download

    with explained(source):
        index = hf_hub_download(source, "model_index.json", revision=options.revision)
        return _checked_index(Path(index).parent, source, classes)


def _checked_index(folder: Path, source: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(
            f"source={str(source)!r} has no model_index.json: give the pipeline's own folder, not one of its parts"
        )
    content: dict[str, Any] = json.loads(index.read_text())
    name: Any = content.get("_class_name")
    if isinstance(name, list):  # a pipeline with its own code: module and class
        name = name[-1]
    if name not in classes:
        kind = kind_of(name)
        raise ValueError(
            f"source={str(source)!r} holds a {name}: "
            + (f"load it with {kind.loader_name}" if kind else "there is no guidance for it")
            + f", or give a {' or '.join(classes)} here"
        )
    return content


def load_part(part: type[Any], source: str | Path, name: str, options: ModelOptions) -> Any:
    """Loads one part of a pipeline, in the precision of the options.

    Args:
        part: Class of the part.
        source: A folder from `locate`, or a hub id, of which only this part is downloaded.
        name: Name of the part in the pipeline.
        options: Precision, variant and revision.

    Raises:
        FileNotFoundError: The part is missing or incomplete.
    """
    from picardopt_3d.compat import load_model, precision  # here: transformers takes seconds

    keywords: dict[str, Any] = {"subfolder": name, "revision": options.revision}
    if issubclass(part, torch.nn.Module):  # tokenizers and schedulers have neither
        keywords |= precision(part, options.torch_dtype) | {"variant": options.variant}
    with explained(source):
        return load_model(part, source, **keywords)


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Replaces errors about the model of a source by ones that name the remedy.

    Raises:
        PermissionError: The model is gated.
        FileNotFoundError: The model cannot be found, reached or read.
    """
    from huggingface_hub import errors

    try:
        yield
    except (OSError, errors.EntryNotFoundError) as error:
        causes = list(_chain(error))
        if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
            raise PermissionError(
                f"source={str(source)!r} is gated: accept its license at https://huggingface.co/{source} while logged "
                f"in, then run `hf auth login` here (or set HF_TOKEN)"
            ) from error
        raise FileNotFoundError(_what_to_do(str(source), error, causes)) from error


def _what_to_do(source: str, error: Exception, causes: Sequence[BaseException]) -> str:
    from huggingface_hub import errors

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(errors.RepositoryNotFoundError):
        if source in REMOVED:
            return f"source={source!r} was removed from the hub by its owner: give the mirror {REMOVED[source]!r}"
        return f"source={source!r}: the hub has no such model; check the id, or if it is private run `hf auth login`"
    if any_is(errors.RevisionNotFoundError):
        return f"source={source!r}: the hub's model has no such revision; check it or leave it out ({error})"
    if Path(source).is_dir():
        return (
            f"source={source!r} could not be loaded: {error}. Give a complete pipeline folder; if it holds only "
            f"weights of another precision, name them with variant (such as 'fp16')"
        )
    if any_is(errors.EntryNotFoundError) and not any_is(errors.LocalEntryNotFoundError):
        return f"source={source!r} is not a pipeline in diffusers' layout: {error}"
    mirror = (
        f" (its owner removed it from the hub; the mirror is {REMOVED[source]!r})"
        if source in REMOVED
        else ""
    )
    return (
        f"source={source!r}{mirror} is not in this machine's cache, and the hub cannot be reached: {error} Connect "
        f"(and unset HF_HUB_OFFLINE), or run `hf download {source} --local-dir FOLDER` elsewhere and give that folder"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and the errors that caused it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def place(unet: Any, device: torch.device, options: ModelOptions) -> Callable[[], None]:
    """Moves a UNet to its device and prepares it as the options say.

    Args:
        unet: The UNet, changed in place.
        device: Device that it computes on.
        options: Memory format, slicing, offloading and compilation.

    Returns:
        A function to call after each use of the UNet.
    """
    if options.channels_last:
        unet.to(memory_format=torch.channels_last)
    if options.attention_slicing:
        unet.set_attention_slice("auto")
    if options.offload == "none":
        with memory_explained(options):
            unet.to(device)
        if options.compile:
            unet.compile()
        return _nothing
    from accelerate import cpu_offload, cpu_offload_with_hook

    if options.offload == "sequential":
        cpu_offload(unet, device, offload_buffers=True)
        return _nothing
    _, hook = cpu_offload_with_hook(unet, device)
    return hook.offload  # type: ignore[no-any-return]


def _nothing() -> None:
    """Does nothing, after a use of a UNet that stays on its device."""


@contextlib.contextmanager
def memory_explained(options: ModelOptions) -> Iterator[None]:
    """Adds the unused options that save memory to the error (`OutOfMemoryError`) of a full device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # its frames hold activations
        raise torch.OutOfMemoryError(
            f"the score model does not fit on the device beside everything else: {error}\nTo save memory, use "
            f"{options.memory_advice()}"
        ) from error
