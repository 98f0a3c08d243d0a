"""The command `picardopt export`, which converts a run to a mesh that other programs open."""

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
    """The options of `picardopt export`.

    Attributes:
        run: Folder of a run, or a scene file.
        format: Format of the mesh; None: the one that the suffix of `out` names, else glb.
        out: The file to write; None: mesh.glb (or .obj, .ply) in the run's folder.
        resolution: Samples along each edge of the cube around the object; twice as many take eight times as long.
        level: Value of the scene's level set at the surface: raise it if the mesh is bloated, lower it if parts are
            missing.
        components: Number of connected pieces to keep, the largest ones; None: all.
        faces: Number of triangles to simplify to, approximately, or as few as preserve the shape (a lower resolution
            has fewer to begin with); None: do not simplify.
        up: Axis that points up in the file; None: y in GLB, as glTF requires, z in OBJ and PLY, as in the scene.
        device: Device that evaluates the scene: "auto" (an accelerator if there is one), "cpu" or "cuda".
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
        """Checks the options.

        Raises:
            ValueError: An option is out of range, or two exclude each other; the message names the remedy.
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
        """The format of the file."""
        if self.format is not None:
            return self.format
        return "glb" if self.out is None else self.out.suffix.lstrip(".").lower()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt export`; None: those of this process.

    Raises:
        SystemExit: 2 if the arguments or the scene cannot be used, 130 after Ctrl-C.
    """
    with cli_errors("export"):
        described = "Convert a run's scene to a mesh with vertex colours."
        print(_export(options_of(ExportConfig, "export", argv, described)))


def _export(config: ExportConfig) -> str:
    """Writes the file, and returns the line to print about it."""
    # Imported here because torch takes seconds to import, which a mistyped option should not wait for.
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
