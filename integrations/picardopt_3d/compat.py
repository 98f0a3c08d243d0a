"""What older transformers and diffusers call otherwise, each with the version that makes it unnecessary.

The package runs on transformers 4.45 and diffusers 0.30 (2024) and later. Nothing else looks at a version; what older
versions of torch and Python lack is in `picardopt.compat`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers.utils import logging

__all__ = [
    "CLIPImageProcessorPil",
    "CLIPTokenizer",
    "T5Tokenizer",
    "load_model",
    "needs_transformers_5",
    "pooled",
    "precision",
]

# The processor that prepares pictures with Pillow; before transformers 5 it was the one without a suffix.
if TYPE_CHECKING or hasattr(transformers, "CLIPImageProcessorPil"):
    from transformers import CLIPImageProcessorPil
else:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

# Before transformers 5 only the tokenizers called fast read a tokenizer.json.
if TYPE_CHECKING or Version(transformers.__version__) >= Version("5"):
    from transformers import CLIPTokenizer, T5Tokenizer
else:
    from transformers import CLIPTokenizerFast as CLIPTokenizer
    from transformers import T5TokenizerFast as T5Tokenizer

_DTYPE = {"diffusers": "0.42", "transformers": "4.56"}
"""Packages whose `from_pretrained` takes a model's precision as `dtype`, and from which version on."""


def precision(part: type[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the argument of a model's `from_pretrained` that sets its precision.

    Args:
        part: Class of the model.
        dtype: The precision.
    """
    packages = {
        kind.__module__.partition(".")[0] for kind in part.__mro__
    }  # ours are made of theirs
    old = any(Version(version(p)) < Version(_DTYPE[p]) for p in packages & _DTYPE.keys())
    return {"torch_dtype" if old else "dtype": dtype}


def load_model(part: type[Any], source: str | Path, **keywords: Any) -> Any:
    """Returns ``part.from_pretrained(source, **keywords)``, with the weights that the files hold.

    CLIP's text encoder of the models that ship was saved by transformers 5, without a prefix. Older ones would not
    find its weights and silently leave it random.

    Args:
        part: Class of the model.
        source: A folder, or a hub id.
        keywords: Of `from_pretrained`.
    """
    older = Version(transformers.__version__) < Version("5.23")
    if not (older and issubclass(part, transformers.CLIPTextModel)):
        return part.from_pretrained(source, **keywords)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the names that are repaired below
    try:
        loaded: Any = part.from_pretrained(source, output_loading_info=True, **keywords)
    finally:
        logging.set_verbosity(level)
    model, found = loaded
    names = {name.removeprefix(_PREFIX): name for name in found["missing_keys"]}
    if names and names.keys() <= set(found["unexpected_keys"]):
        variant = f".{keywords['variant']}" if keywords.get("variant") else ""
        file = Path(source, keywords.get("subfolder", ""), f"model{variant}.safetensors")
        model.load_state_dict({names[name]: weight for name, weight in load_file(file).items()})
    return model


_PREFIX = "text_model."


def pooled(output: Any) -> torch.Tensor:
    """Returns CLIP's features of texts or pictures: before transformers 5 they were all of the output."""
    features: torch.Tensor = getattr(output, "pooler_output", output)
    return features


def needs_transformers_5(what: str) -> None:
    """Raises where transformers is older than 5.

    Raises:
        RuntimeError: Names what needs it.
    """
    if Version(transformers.__version__) < Version("5"):
        raise RuntimeError(
            f"{what} needs transformers 5 or later, and this is {transformers.__version__}: pip install -U transformers"
        )
