"""The house rules that no other tool checks: short files, short functions, and who may import parts of torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "picardopt", ROOT / "integrations" / "picardopt_3d")
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
LINES, FUNCTION_LINES = 300, 60
ARITHMETIC = ("sweep", "window", "tolerance", "predictor", "protocols")
"""Modules of the core that know nothing of torch.distributed, torch.optim and the like."""


def too_long(source: str) -> Iterator[str]:
    """What of a file is longer than it may be."""
    lines = len(source.splitlines())
    if lines > LINES:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{node.name} has {length} lines"


def torch_parts(source: str) -> set[str]:
    """Names of torch's submodules that a file imports or reaches through `torch`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("torch.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            _, *rest = (node.module or "").split(".")
            found |= {rest[0]} if rest else {a.name for a in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            found.add(node.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert list(too_long(path.read_text())) == []


@pytest.mark.parametrize("name", ARITHMETIC)
def test_the_arithmetic_knows_tensors_only(name: str) -> None:
    parts = torch_parts((ROOT / "picardopt" / f"{name}.py").read_text())
    assert not parts & {"distributed", "optim", "autograd", "cuda", "multiprocessing"}


def test_the_core_imports_absolutely() -> None:
    """As the 3D package does: one way to write an import."""
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGES[0].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_what_is_too_long_is_found() -> None:
    body = "    pass\n" * FUNCTION_LINES
    assert list(too_long(f"def f():\n{body}")) == ["f has 61 lines"]
    assert list(too_long("x = 1\n" * 301)) == ["301 lines"]
    assert torch_parts("import torch.distributed as d") == {"distributed"}
    assert torch_parts("from torch import distributed, Tensor") == {"distributed", "Tensor"}
    assert torch_parts("from torch.optim.sgd import SGD") == {"optim"}
    assert torch_parts("def f():\n    return torch.cuda.is_available()") == {"cuda"}
