"""The command `picardopt doctor`: what is installed, which devices there are, which models can be used.

Nothing large is loaded unless asked for, so that it answers within seconds on a machine where something is wrong. (But
where gsplat is used on a GPU for the first time, it compiles its kernels, which takes minutes.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from picardopt_3d.cli_errors import options_of
from picardopt_3d.doctor.devices import devices
from picardopt_3d.doctor.finding import Finding
from picardopt_3d.doctor.mesh_rasterizers import mesh_rasterizers
from picardopt_3d.doctor.models import hub_models, loaded, shipped_models
from picardopt_3d.doctor.packages import installed, optional_packages, required_packages
from picardopt_3d.doctor.rasterizers import rasterizers

_ELSEWHERE = (
    "where the hub cannot be reached: `hf download ID --local-dir DIR` on a machine that reaches it, and give DIR "
    "in place of the id"
)


@dataclass(frozen=True)
class Doctor:
    """Options of `picardopt doctor`.

    Attributes:
        load: Load each shipped model too.
        offline: Do not ask the hub which models could be downloaded.
    """

    load: bool = False
    offline: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt doctor`; None: those of the process.

    Raises:
        SystemExit: 1 if the shipped path does not work; 2 for arguments that cannot be used.
    """
    described = "List what is installed, which devices there are and which models can be used."
    options = options_of(Doctor, "doctor", argv, described)
    packages = required_packages()
    shipped = shipped_models()
    if options.load and all(found.state == "ok" for found in packages):
        shipped = [loaded(found) if found.state == "ok" else found for found in shipped]
    _print("packages", [*packages, *optional_packages()])
    if installed("torch"):
        _print("devices", devices())
        _print("rasterizers of 3D Gaussians", rasterizers())
        _print("rasterizers of triangles", mesh_rasterizers())
    _print("shipped models", shipped)
    if installed("huggingface-hub"):
        _print("models of the hub", hub_models(options.offline))
        print(f"  ({_ELSEWHERE})")
    wrong = [found.name for found in [*packages, *shipped] if found.state != "ok"]
    if wrong:
        print(f"\nthe shipped path does not work: see {', '.join(wrong)} above")
        raise SystemExit(1)
    print('\nthe shipped path works: `picardopt text-to-3d "a red cube" --out DIR`')


def _print(title: str, findings: Iterable[Finding]) -> None:
    """Prints one part of the report."""
    found = list(findings)
    width = max(len(one.name) for one in found)
    print(f"{title}\n" + "\n".join(f"  {s:<6}  {n:<{width}}  {d}" for s, n, d in found), flush=True)
