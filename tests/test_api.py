"""The public API is what docs/api.txt says, and documents, examples and adapters use nothing else."""

import ast
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

import picardopt
from tests.helpers import api
from tests.helpers.versions import needs_3d, needs_package

CODE = [*api.ROOT.glob("examples/*.py"), *api.ROOT.glob("integrations/adapters/*/*.py")]
DOCUMENTS = [
    api.ROOT / "README.md",
    *api.ROOT.glob("docs/**/*.md"),
    *api.ROOT.glob("integrations/**/README.md"),
]
NAME = re.compile(r"    (?:class |dataclass )?(\w+)")

SMALL = """
from dataclasses import dataclass, field

from small.inner import Base

LIMIT: int = 3


@dataclass(frozen=True)
class Options(Base):
    first: int
    names: list[str] = field(default_factory=list)
    _hidden: int = 0

    def total(self, by: float, *, exact: bool = False) -> float:
        return by

    @property
    def rate(self) -> float:
        return 1.0

    def _internal(self) -> None: ...


def run(options: "Options", /, *rest: str) -> None: ...
"""
INNER = """
class Base(ValueError):
    @classmethod
    def made(cls) -> "Base": ...
"""


def written() -> dict[str, set[str]]:
    """The public names by module, as docs/api.txt has them."""
    found: dict[str, set[str]] = {}
    for line in api.PATH.read_text().splitlines():
        if re.fullmatch(r"picardopt[\w.]*", line):
            module = found.setdefault(line, set())
        elif line == "commands":
            break
        elif (name := NAME.match(line)) and not line.startswith("     "):
            module.add(name[1])
    return found


def modules() -> list[object]:
    """The public modules, as parameters; those of the 3D package where it is installed."""
    return [
        pytest.param(name, marks=needs_3d if name.startswith("picardopt_3d") else ())
        for name in api.PUBLIC
    ]


@needs_package("griffe")
def test_the_public_api_is_as_written() -> None:
    before, now = api.PATH.read_text().splitlines(), api.current().splitlines()
    changes = "\n".join(difflib.unified_diff(before, now, "docs/api.txt", "the code", lineterm=""))
    assert not changes, (
        f"the public API differs from docs/api.txt. If that is meant, run `{api.COMMAND}` and say in CHANGELOG.md what "
        f"takes the place of old names. What users need not know gets an underscore, or is not in PUBLIC.\n{changes}"
    )


@needs_package("griffe")
def test_what_is_written_of_a_small_package(tmp_path: Path) -> None:
    package = tmp_path / "small"
    package.mkdir()
    (package / "__init__.py").write_text(SMALL)
    (package / "inner.py").write_text(INNER)
    loaded = api.load([tmp_path], ["small"])
    text = api.render(api.public_names(loaded, {"small": "LIMIT Options run"}))
    assert text.split("\n") == [
        "",
        "small",
        "    LIMIT: int = 3",
        "    dataclass Options(ValueError)",
        "        first: int",
        "        names: list[str] = field(default_factory=list)",
        "        classmethod made() -> Base",
        "        property rate: float",
        "        total(by: float, *, exact: bool = False) -> float",
        "    run(options: Options, /, *rest: str) -> None",
        "",
    ]


def test_long_signatures_have_a_line_for_each_parameter() -> None:
    signature = (
        f"f({', '.join(f'a{i}: dict[str, tuple[int, int]] = (1, 2)' for i in range(3))}) -> int"
    )
    lines = list(api._wrapped(signature))
    assert lines[0] == "f("
    assert lines[-1] == ") -> int"
    assert lines[1:-1] == [f"    a{i}: dict[str, tuple[int, int]] = (1, 2)," for i in range(3)]
    assert list(api._wrapped("f(a: int) -> int")) == ["f(a: int) -> int"]


@pytest.mark.parametrize("name", modules())
def test_what_is_written_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert written()[name]
    assert {each for each in written()[name] if not hasattr(module, each)} == set()


def test_the_core_offers_nothing_else() -> None:
    """A name of the package that is neither listed nor one of its modules would be public by accident."""
    inside = {module.name for module in pkgutil.iter_modules(picardopt.__path__)}
    offered = {name for name in vars(picardopt) if not name.startswith("_")}
    assert offered - inside <= written()["picardopt"]


@pytest.mark.parametrize("name", modules())
def test_public_functions_and_classes_are_documented(name: str) -> None:
    module, missing = importlib.import_module(name), []
    for each in written()[name]:
        value = getattr(module, each)
        if inspect.isfunction(value) or _is_class(value):
            inner = vars(value) if _is_class(value) else {}
            own = {k: v for k, v in inner.items() if not k.startswith("_") and _is_method(v)}
            missing += [k for k, v in {each: value, **own}.items() if not inspect.getdoc(v)]
    assert missing == []


def _is_class(value: Any) -> bool:
    """Callable[...] is a class, too, where Python is older than 3.11."""
    return inspect.isclass(value) and get_origin(value) is None and value.__module__ != "types"


def _is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Modules and names of our packages that a source imports; a name is "" where the module itself is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("picardopt"):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.startswith("picardopt"))


def not_public(source: str) -> list[str]:
    """What a source imports of our packages that is not public."""
    public = written()
    return [
        f"{module} {name}".strip()
        for module, name in imported(source)
        if not (name in public.get(module, ()) or f"{module}.{name}".rstrip(".") in public)
        and module != "picardopt_3d"
    ]


@pytest.mark.parametrize("path", [*CODE, *DOCUMENTS], ids=lambda p: str(p.relative_to(api.ROOT)))
def test_documents_and_examples_use_public_names_alone(path: Path) -> None:
    text = path.read_text()
    blocks = [text] if path.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = [name for block in blocks for name in not_public(block)]
    assert found == [], f"list them in PUBLIC of tests/helpers/api.py, then run `{api.COMMAND}`"


def test_names_that_are_not_public_are_found() -> None:
    assert not_public("from picardopt import Stats\nfrom picardopt.stats import SweepRecord") == []
    assert not_public("import picardopt\nfrom picardopt_3d.scenes.gaussians import strategy") == []
    assert not_public("from picardopt.stats import end_sweep") == ["picardopt.stats end_sweep"]
    assert not_public("from picardopt import end_sweep") == ["picardopt end_sweep"]
    assert not_public("import picardopt.turns") == ["picardopt.turns"]
