"""What tests need of the versions here. Where that is missing they are skipped, and say why.

`make test-torch` runs the core's tests on other versions of torch, without the 3D package and the published optimizers.
"""

import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.11 has it
    import tomli as tomllib

__all__ = [
    "needs_3d",
    "needs_package",
    "needs_python",
    "needs_torch",
    "needs_transformers_5",
    "tomllib",
]


def needs_torch(minimum: str, has: str) -> pytest.MarkDecorator:
    """Skips a test where torch is older than it needs.

    Args:
        minimum: The first that will do, such as "2.6".
        has: What that one has.
    """
    return pytest.mark.skipif(
        torch.torch_version.TorchVersion(torch.__version__) < minimum,
        reason=f"torch {minimum} has {has}; this is {torch.__version__}",
    )


def needs_python(minor: int, has: str) -> pytest.MarkDecorator:
    """Skips a test where Python 3 is older than its minor version here."""
    return pytest.mark.skipif(sys.version_info < (3, minor), reason=f"Python 3.{minor} has {has}")


def needs_package(*names: str) -> pytest.MarkDecorator:
    """Skips a test where one of these is not installed; a name is that which one imports."""
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_3d = needs_package("picardopt_3d")
needs_transformers_5 = pytest.mark.skipif(
    find_spec("transformers") is not None and version("transformers") < "5",
    reason="transformers 5 makes tokenizers of what training has learned",
)
