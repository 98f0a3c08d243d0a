"""The command `picardopt export`: from a run to a mesh that other programs open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from picardopt_3d.cli_errors import cli_errors, options_of

FORMATS = ("glb", "obj", "ply")


@dataclass(frozen=True)
class ExportConfig:
    """What is made of which run.

    Attributes:
        run: Folder of a run, or a scene file.
        format: Of the mesh; None: what the suffix of `out` says, else glb.
        out: The file to write; None: mesh.glb (or .obj, .ply) in the run's folder.
        resolution: Samples along each edge of the cube about the object; twice as many take eight times as long.
        level: Where the surface is, in the scene's own measure of how far inside a point is: raise it if the mesh is
            bloated, lower it if parts are missing.
        components: Keep only this many connected pieces, the largest ones; None: all.
        faces: Simplify to about this many triangles, or as few as leave the shape what it is (a lower resolution has
            fewer to begin with); None: do not.
        up: Axis that points up in the file; None: y in GLB, as glTF prescribes, z in OBJ and PLY, as in the scene.
        device: Where the scene is evaluated: "auto" (an accelerator if there is one), "cpu" or "cuda".
    """

    run: Positional[Path]
    format: Literal["glb", "obj", "ply"] | None = None
    out: Path | None = None
    resolution: int = 128
    level: float = 0.0
    components: int | None = None
    faces: int | None = None
    up: Literal["z", "y"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Checks for options that do not go together.

        Raises:
            ValueError: They do not; the message says what to do.
        """
        for name, least in (("resolution", 8), ("components", 1), ("faces", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give at least {least}")
        if self.format is None and self.out is not None:
            suffix = self.out.suffix.lstrip(".").lower()
            if suffix not in FORMATS:
                raise ValueError(
                    f"out={str(self.out)!r}: its suffix names no format; end it in .{', .'.join(FORMATS)}, or give "
                    f"--format"
                )
        if self.kind == "glb" and self.up == "z":
            raise ValueError(
                "up=z with format glb: glTF has y up; leave --up out, or export obj or ply"
            )

    @property
    def kind(self) -> str:
        """The format that is written."""
        if self.format is not None:
            return self.format
        return "glb" if self.out is None else self.out.suffix.lstrip(".").lower()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt export`; None: those of the process.

    Raises:
        SystemExit: 2 if the arguments or the scene cannot be used, 130 after Ctrl-C.
    """
    with cli_errors("export"):
        described = "Make a mesh with vertex colours of a run's scene."
        print(_export(options_of(ExportConfig, "export", argv, described)))


def _export(config: ExportConfig) -> str:
    """Writes the file, and returns what to print of it."""
    # Only now: torch takes seconds to import, which a mistyped option should not.
    from tqdm import tqdm

    from picardopt_3d.export.mesh import extract_mesh, points_of
    from picardopt_3d.export.mesh_files import save_mesh
    from picardopt_3d.run.finished import open_scene, scene_file

    path = scene_file(config.run)
    folder = config.run if config.run.is_dir() else path.parent
    out = config.out or folder / f"mesh.{config.kind}"
    if out.is_dir():
        raise IsADirectoryError(f"out={str(out)!r} is a folder: give the file to write")
    scene = open_scene(path, config.device)
    with tqdm(
        total=points_of(config.resolution), desc="surface", unit="point", unit_scale=True
    ) as bar:
        mesh = extract_mesh(
            scene,
            config.resolution,
            level=config.level,
            components=config.components,
            faces=config.faces,
            progress=bar.update,
        )
    save_mesh(mesh, out, config.kind, config.up)  # type: ignore[arg-type]
    return f"{out}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles"
