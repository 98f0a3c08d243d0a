"""The two distributions: their metadata, what they import, and the command that joins them."""

import ast
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import picardopt
from tests.helpers.versions import needs_3d, tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = {
    "picardopt": ROOT / "pyproject.toml",
    "picardopt-3d": ROOT / "integrations/pyproject.toml",
}
DISTRIBUTIONS = ["picardopt", pytest.param("picardopt-3d", marks=needs_3d)]
PACKAGES = {"picardopt": "picardopt", "picardopt-3d": "picardopt_3d"}


def project_table(distribution: str) -> dict:
    return tomllib.loads(PROJECTS[distribution].read_text())["project"]


def package_folder(distribution: str) -> Path:
    return Path(find_spec(PACKAGES[distribution]).origin).parent


def third_party_imports(folder: Path) -> dict[str, str]:
    """Top-level modules outside the standard library, each with a file that imports it."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            found.update({name.partition(".")[0]: str(path) for name in names})
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


def required(distribution: str) -> set[str]:
    """Canonical names of what a distribution needs without extras."""
    requirements = map(Requirement, metadata.requires(distribution))
    return {canonicalize_name(r.name) for r in requirements if "extra" not in str(r.marker)}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_installed_metadata_is_the_clones(distribution):
    table = project_table(distribution)
    installed = metadata.metadata(distribution)
    assert installed["Version"] == picardopt.__version__
    assert installed["Requires-Python"] == table["requires-python"]
    assert installed["License-Expression"] == "Apache-2.0"


@needs_3d
def test_both_distributions_agree():
    import picardopt_3d

    core, threed = map(project_table, PROJECTS)
    assert metadata.version("picardopt") == metadata.version("picardopt-3d")
    assert picardopt.__version__ == picardopt_3d.__version__
    assert core["requires-python"] == threed["requires-python"]
    bounds = [
        {r.name: r.specifier for r in map(Requirement, t["dependencies"])} for t in (core, threed)
    ]
    assert bounds[0]["torch"] == bounds[1]["torch"]
    assert bounds[0]["numpy"] == bounds[1]["numpy"]
    assert picardopt.__version__ in bounds[1]["picardopt"]
    assert [Requirement(r).name for r in core["optional-dependencies"]["3d"]] == ["picardopt-3d"]


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(v for v in versions if v != "Unreleased") == picardopt.__version__


def test_the_lowest_versions_are_tested():
    """The first line of .ci/versions is what pyproject.toml allows at the least; the nightly runs every line."""
    table = project_table("picardopt")
    lines = (ROOT / ".ci" / "versions").read_text().splitlines()
    lines = [line.split() for line in lines if not line.startswith("#")]
    workflow = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    entries = re.findall(r'python: "(.+)", torch: "(.+)", more: "(.*)"', workflow)
    assert [[f"python{p}", f"torch=={t}", *more.split()] for p, t, more in entries] == lines
    (python, *fixed), lowest = lines[0], {}
    extra = table["optional-dependencies"]["test-core"]
    for requirement in map(Requirement, [*table["dependencies"], *extra]):
        lowest[requirement.name] = requirement.specifier
    assert table["requires-python"] == f">={python.removeprefix('python')}"
    for name, _, version in (pin.partition("==") for pin in fixed):
        bound = str(lowest[name]).removeprefix(">=")
        assert version in lowest[name]
        assert version.startswith(bound), f"{name}: {version} is tested, {bound} is allowed"
    assert {"torch", "numpy"} <= {pin.partition("==")[0] for pin in fixed}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_marked_as_typed(distribution):
    assert (package_folder(distribution) / "py.typed").is_file()


def test_core_needs_torch_and_numpy_only():
    assert required("picardopt") == {"torch", "numpy"}
    imports = third_party_imports(package_folder("picardopt"))
    assert set(imports) <= {"torch", "numpy", "picardopt"}, imports


NOT_ON_THE_INDEX = {"nvdiffrast"}
"""What a user builds from its sources: no requirement can name it."""


@needs_3d
def test_3d_declares_what_it_imports():
    owners = metadata.packages_distributions()
    extras = project_table("picardopt-3d")["optional-dependencies"].values()
    optional = {canonicalize_name(Requirement(r).name) for extra in extras for r in extra}
    declared = required("picardopt-3d") | optional | {"picardopt-3d"} | NOT_ON_THE_INDEX
    undeclared = {
        name: path
        for name, path in third_party_imports(package_folder("picardopt-3d")).items()
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared
    }
    assert not undeclared


def loaded(module: str, cwd: Path) -> set[str]:
    """Names of all modules that are there after an import in a new process."""
    script = f"import sys, {module}; print(*sys.modules)"
    return set(run(sys.executable, "-W", "error", "-c", script, cwd=cwd).split())


def tops(modules: set[str]) -> set[str]:
    found = {name.partition(".")[0] for name in modules}
    return {name for name in found if not name.startswith("_sysconfigdata")}


def test_importing_the_core_is_quick_and_loads_no_optional_package(tmp_path):
    """Counted in modules, not in seconds: ours take 0.1 s beside torch's own second, and load none more of torch's."""
    before, after = loaded("torch, numpy", tmp_path), loaded("torch, numpy, picardopt", tmp_path)
    # torch itself loads tqdm where there is one.
    assert tops(after) - tops(before) - sys.stdlib_module_names == {"picardopt"}
    unwanted = {"picardopt_3d", "diffusers", "transformers", "tyro", "matplotlib", "imageio", "PIL"}
    assert not tops(after) & unwanted
    more = after - before
    own = {name for name in more if name.startswith("picardopt")}
    assert {name for name in more if name.startswith(("torch", "numpy"))} == set()
    assert 50 < len(own) < 120
    assert len(more - own) < 15


@needs_3d
def test_importing_both_warns_of_nothing(tmp_path):
    assert loaded("picardopt, picardopt_3d", tmp_path) > {"picardopt", "picardopt_3d"}


@needs_3d
def test_command_lists_and_runs_the_entry_points(tmp_path):
    command = Path(sysconfig.get_path("scripts"), "picardopt")
    assert command.is_file(), f"{command} is missing: install both distributions (make env)"
    names = metadata.entry_points(group="picardopt.commands").names
    assert "text-to-3d" in names
    listing = run(str(command), cwd=tmp_path)
    assert all(name in listing for name in names)
    page = run(str(command), "text-to-3d", "--help", cwd=tmp_path)
    for option in (
        "--out",
        "--workers",
        "--seed",
        "--recipe.steps",
        "--window",
        "--tolerance",
        "--sequential",
    ):
        assert option in page, option


@needs_3d
def test_unknown_command_fails_and_names_the_known_ones(tmp_path):
    command = Path(sysconfig.get_path("scripts"), "picardopt")
    done = subprocess.run(
        [str(command), "no-such-command"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "no-such-command" in done.stderr
    assert "text-to-3d" in done.stderr
