"""Where the adapters are, and how a reader's clone would import one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ADAPTERS = Path(__file__).parents[3] / "integrations" / "adapters"


def load(name: str, path: Path) -> ModuleType:
    """A file as a module of a name, the same one at each call."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
