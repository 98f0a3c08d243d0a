"""What older transformers and diffusers call otherwise, each with the version that makes it unnecessary.

The package runs on transformers 4.45 and diffusers 0.30 (2024) and later. Nothing else looks at a version; what older
versions of torch and Python lack is in `picardopt.compat`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

__all__ = ["CLIPImageProcessorPil", "CLIPTokenizer", "T5Tokenizer", "precision"]

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
    package = part.__module__.partition(".")[0]
    since = _DTYPE.get(package)
    old = since is not None and Version(version(package)) < Version(since)
    return {"torch_dtype" if old else "dtype": dtype}
