"""The public API as text: `python -m tests.helpers.api`, from the repository's root, writes docs/api.txt anew.

Read from the sources, not from what was imported: the text is the same on every Python and torch.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "api.txt"
COMMAND = "python -m tests.helpers.api"

HEADER = f"""\
# The public API of picardopt and picardopt-3d: every public name with its signature, and the commands, whose options
# are the fields of their configurations (TextTo3DConfig, ...). Every other name, and the words of messages, may change
# in any release.
#
# Deprecation: a public name goes, or its signature breaks, only after a minor release in which its use warns
# (DeprecationWarning) and says what takes its place. CHANGELOG.md lists both.
#
# tests/test_api.py compares this file with the code. After a change that is meant: {COMMAND}
"""

WIDTH = 120
EXPORTED = "*"
"""All that a module exports: its `__all__`, or the names that it imports as themselves."""

PUBLIC: dict[str, str] = {
    "picardopt": EXPORTED,
    "picardopt.layout": "Row",
    "picardopt.links": "ETHERNET LINKS LOOPBACK NVLINK PCIE Link",
    "picardopt.measures": "DriftMeasures DriftPair GroupMeasures Measures Threshold",
    "picardopt.memory": "Memory",
    "picardopt.planner": "Measured Option",
    "picardopt.predictor": "Coast Predictor",
    "picardopt.reference": "Solution Sweep algorithm_2",
    "picardopt.stats": "HISTORY SweepRecord",
    "picardopt.tolerance": "Tolerance",
    "picardopt_3d.cameras": "CameraConfig Cameras orbit_cameras random_cameras turntable_cameras",
    "picardopt_3d.config": "ImageTo3DConfig RunConfig TextTo3DConfig",
    "picardopt_3d.evaluate.command": "EvaluateConfig",
    "picardopt_3d.export.command": "ExportConfig",
    "picardopt_3d.guidance": EXPORTED,
    "picardopt_3d.guidance.deepfloyd": "DeepFloyd",
    "picardopt_3d.guidance.denoise": "Denoising",
    "picardopt_3d.guidance.diffusion": "TextDiffusion",
    "picardopt_3d.guidance.loading": "ModelOptions",
    "picardopt_3d.guidance.pixel_diffusion": "SHIPPED PixelDiffusion",
    "picardopt_3d.guidance.stable_diffusion": "SHIPPED StableDiffusion",
    "picardopt_3d.guidance.text_to_view": "TextToViewPipeline",
    "picardopt_3d.guidance.vsd": "VSD VsdConfig",
    "picardopt_3d.guidance.zero123": "SHIPPED Zero123",
    "picardopt_3d.guidance.zero123_pipeline": "Zero123Pipeline",
    "picardopt_3d.images": "ReferenceImage load_reference prepare_reference save_reference",
    "picardopt_3d.methods": EXPORTED,
    "picardopt_3d.methods.optim": "OptimizerConfig",
    "picardopt_3d.picard": "PicardConfig PicardOptions make_optimizer",
    "picardopt_3d.problem": "Losses Problem",
    "picardopt_3d.prompts": "ImagePrompt PerpNeg TextPrompt ViewWords",
    "picardopt_3d.rendering": "render_in_parts render_rgb",
    "picardopt_3d.run.folder": "RunFolder StageFolder",
    "picardopt_3d.run.loop": "closure_of train",
    "picardopt_3d.run.record": "RunRecord",
    "picardopt_3d.scenes": EXPORTED,
    "picardopt_3d.scenes.gaussians": EXPORTED,
    "picardopt_3d.scenes.gaussians.config": "GaussiansConfig StrategyConfig",
    "picardopt_3d.scenes.gaussians.statistics": "RunningStatistics Statistics",
    "picardopt_3d.scenes.gaussians.strategy": "apply densifies densify_and_prune due reset_opacities resets",
    "picardopt_3d.task": "ImageTask Task TextTask",
    "picardopt_3d.world": EXPORTED,
}
"""The public modules, and the names of each that are public."""

_SHOWN = {"__call__", "__getitem__", "__init__", "__iter__", "__len__"}
"""Special methods that are part of a signature."""


def load(paths: Iterable[Path], packages: Iterable[str]) -> dict[str, Any]:
    """Returns packages as griffe reads them from their sources.

    Args:
        paths: Folders that hold them.
        packages: Their names.
    """
    import griffe

    loader = griffe.GriffeLoader(search_paths=[*paths], allow_inspection=False)
    loaded: dict[str, Any] = {name: loader.load(name) for name in packages}
    loader.resolve_aliases(implicit=False, external=False)
    return loaded


def exported(module: Any) -> dict[str, str]:
    """Returns the names that a module exports, with the paths of what they stand for."""
    if module.exports is not None:
        return {name: f"{module.path}.{name}" for name in sorted(map(str, module.exports))}
    tree = ast.parse(Path(module.filepath).read_text())
    return {
        name.name: f"{node.module}.{name.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.name == name.asname
    }


def public_names(loaded: dict[str, Any], public: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns each public module's names with what they stand for."""

    def at(path: str) -> Any:
        package, _, rest = path.partition(".")
        return loaded[package][rest] if rest else loaded[package]

    found = {}
    for path, names in public.items():
        chosen = {name: f"{path}.{name}" for name in names.split()}
        paths = exported(at(path)) if names == EXPORTED else chosen
        found[path] = {name: _final(at(each)) for name, each in sorted(paths.items())}
    return found


def render(found: dict[str, dict[str, Any]]) -> str:
    """Returns what is public, a line for each name, indented below its module or class."""
    places: dict[str, str] = {}
    for path, members in found.items():
        for name, each in members.items():
            places.setdefault(each.path, f"{path}.{name}")
    lines = []
    for path, members in found.items():
        lines += ["", path]
        for name, each in members.items():
            if (place := places[each.path]) != f"{path}.{name}":
                lines.append(f"    {name} = {place}")
            else:
                lines += (f"    {line}" for line in _lines(name, each, set(places)))
    return "\n".join(lines) + "\n"


def _final(each: Any) -> Any:
    return each.final_target if each.is_alias else each


def members(each: Any, elsewhere: set[str]) -> list[tuple[str, Any]]:
    """Returns a class's public members, and those of its bases that are not public themselves.

    Fields of dataclasses and named tuples come first, in their order, and stand for the constructor.
    """
    inner = [_final(base) for base in each.mro()]
    found: dict[str, Any] = {}
    for kind in [each, *(base for base in inner if base.path not in elsewhere)]:
        for name, member in kind.members.items():
            if member.is_alias or (name.startswith("_") and name not in _SHOWN):
                continue
            # A property of a base, set in the constructor, is still a property.
            if name not in found or "property" in member.labels:
                found[name] = member
    fields = [name for name, member in found.items() if _is_field(each, member)]
    if _has_fields(each):
        found.pop("__init__", None)
    rest = sorted(found.keys() - fields, key=lambda name: (name != "__init__", name))
    return [(name, found[name]) for name in [*fields, *rest]]


def _has_fields(kind: Any) -> bool:
    return "dataclass" in kind.labels or any(str(base) == "NamedTuple" for base in kind.bases)


def _is_field(kind: Any, member: Any) -> bool:
    return (
        _has_fields(kind)
        and member.is_attribute
        and member.annotation is not None
        and "property" not in member.labels
    )


def _bases(each: Any, elsewhere: set[str]) -> Iterator[str]:
    """Yields the names of a class's bases; of one that is not public, those of its own."""
    inner = {base.name: _final(base) for base in each.resolved_bases}
    for expression in map(str, each.bases):
        name = expression.partition("[")[0].rpartition(".")[2]
        if name in inner and inner[name].path not in elsewhere:
            yield from _bases(inner[name], elsewhere)
        else:
            yield expression


def _lines(name: str, each: Any, elsewhere: set[str]) -> Iterator[str]:
    """Yields the lines of a name: a class's members are indented."""
    if each.is_class:
        bases = ", ".join(_bases(each, elsewhere))
        kind = "dataclass" if "dataclass" in each.labels else "class"
        yield f"{kind} {name}" + (f"({bases})" if bases else "")
        for inner, member in members(each, elsewhere):
            yield from (f"    {line}" for line in _lines(inner, member, elsewhere))
    elif each.is_function:
        kinds = "".join(f"{k} " for k in ("classmethod", "staticmethod") if k in each.labels)
        yield from _wrapped(f"{kinds}{name}{_signature(each)}")
    else:
        yield _attribute(name, each)


def _signature(function: Any) -> str:
    text = str(function.signature()).removeprefix(function.name)
    if function.parent.is_class and "staticmethod" not in function.labels:
        text = re.sub(r"\((self|cls)(, )?", "(", text, count=1)
    return text


def _wrapped(signature: str) -> Iterator[str]:
    """Yields a signature in one line or, if it is too long, with a line for each parameter."""
    if len(signature) <= WIDTH:
        yield signature
        return
    start, depth = signature.index("(") + 1, 0
    yield signature[:start]
    for index, character in enumerate(signature[start:], start):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or (depth == 0 and signature[index : index + 2] == ", "):
            yield f"    {signature[start:index].strip()},"
            start = index + 1
        if depth < 0:
            yield signature[index:]
            return


def _attribute(name: str, each: Any) -> str:
    if "property" in each.labels:
        writable = " (can be set)" if "writable" in each.labels else ""
        return f"property {name}: {each.annotation}{writable}"
    value = None if each.value is None else str(each.value)
    shown = value is not None and len(value) <= 60 and "\n" not in value
    if each.parent.is_class and "class-attribute" not in each.labels:
        shown = False  # set by the constructor
    return (
        name
        + (f": {each.annotation}" if each.annotation is not None else "")
        + (f" = {value}" if shown else "")
    )


def commands() -> str:
    """Returns the commands, as both distributions declare them."""
    from tests.helpers.versions import tomllib

    table = tomllib.loads((ROOT / "integrations" / "pyproject.toml").read_text())
    names = table["project"]["entry-points"]["picardopt.commands"]
    return "\ncommands\n" + "".join(f"    picardopt {name}\n" for name in names)


def current() -> str:
    """Returns the text of docs/api.txt as the code is now."""
    loaded = load([ROOT, ROOT / "integrations"], ["picardopt", "picardopt_3d"])
    return HEADER + render(public_names(loaded, PUBLIC)) + commands()


if __name__ == "__main__":
    PATH.write_text(current())
    print(f"wrote {PATH} (griffe {metadata.version('griffelib')})")
