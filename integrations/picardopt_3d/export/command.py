"""The command `picardopt export`, which converts a run to a mesh or to Gaussians that other programs open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from tyro.conf import Positional

from picardopt_3d.cli_errors import cli_errors, options_of

if TYPE_CHECKING:
    from picardopt_3d.scenes.gaussians.splats import Splats

Kind = Literal["glb", "obj", "ply", "splat", "splats-glb", "html"]

SUFFIXES = ("glb", "obj", "ply", "splat", "html")
MESHES = ("glb", "obj", "ply")
SPLATS = ("ply", "splat", "splats-glb")
TEXTURED = ("glb", "obj")


@dataclass(frozen=True)
class ExportConfig:
    """The options of `picardopt export`.

    Attributes:
        run: Folder of a run, or a scene file.
        format: Format of the file; None: the one that the suffix of `out` names, else glb. A scene of Gaussians is
            written as it is to ply, splat and splats-glb (glTF with KHR_gaussian_splatting), as a mesh of its density
            to glb and obj. Other scenes are written as meshes, to glb, obj and ply. A mesh keeps its texture in glb,
            and in obj with a material and a picture beside it. html writes the run's page again, also for runs of
            earlier versions.
        out: The file to write; None: mesh.glb (or .obj, .ply) in the run's folder, or splats.ply (.splat, .glb), or
            viewer.html.
        resolution: Samples along each edge of the cube around the object; twice as many take eight times as long. Like
            `level`, not for scenes that consist of triangles.
        level: Value of the scene's level set at the surface: raise it if the mesh is bloated, lower it if parts are
            missing.
        components: Number of connected pieces to keep, the largest ones; None: all.
        faces: Approximate number of triangles to simplify to, or more if the shape needs them (a lower resolution has
            fewer to begin with); None: do not simplify, or to 50,000 with `texture`.
        texture: Pixels along each edge of a texture, to which the mesh is unwrapped and the scene's views are baked;
            None: colours at the vertices, or the texture that the scene has.
        up: Axis that points up in the file; None: y in glTF, which requires it, z in the others, as in the scene. Most
            viewers of Gaussians expect minus-y in PLY and .splat.
        device: Device that evaluates the scene: "auto" (an accelerator if there is one), "cpu" or "cuda".
    """

    run: Positional[Path]
    format: Kind | None = None
    out: Path | None = None
    resolution: int = 128
    level: float = 0.0
    components: int | None = None
    faces: int | None = None
    texture: int | None = None
    up: Literal["z", "y", "minus-y"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: An option is out of range, or two exclude each other; the message names the remedy.
        """
        for name, least in (("resolution", 8), ("components", 1), ("faces", 4), ("texture", 16)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give at least {least}")
        if self.format is None and self.out is not None:
            suffix = self.out.suffix.lstrip(".").lower()
            if suffix not in SUFFIXES:
                raise ValueError(
                    f"out={str(self.out)!r}: its suffix names no format; end it in .{', .'.join(SUFFIXES)}, or give "
                    f"--format"
                )
        if self.texture is not None and self.kind not in TEXTURED:
            raise ValueError(
                f"texture={self.texture} with format {self.kind}: it holds no texture; give {' or '.join(TEXTURED)}"
            )
        if self.kind.endswith("glb") and self.up not in (None, "y"):
            raise ValueError(
                f"up={self.up} with format {self.kind}: glTF has y up; leave --up out, or export another format"
            )

    @property
    def kind(self) -> Kind:
        """The format of the file."""
        if self.format is not None:
            return self.format
        return "glb" if self.out is None else cast(Kind, self.out.suffix.lstrip(".").lower())

    def of_meshes(self) -> list[str]:
        """Returns the options that were given and only meshes have, as on the command line."""
        own = {"resolution", "level", "components", "faces", "texture"}
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return [f"--{field.name}" for field in given if field.name in own]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The arguments after `picardopt export`; None: those of this process.

    Raises:
        SystemExit: 2 if the arguments or the scene cannot be used, 130 after Ctrl-C.
    """
    with cli_errors("export"):
        described = "Convert a run's scene to a mesh, with or without a texture, or to a file of its Gaussians."
        print(_export(options_of(ExportConfig, "export", argv, described)))


def _export(config: ExportConfig) -> str:
    """Writes the file, and returns the line to print about it."""
    # Imported here because torch takes seconds to import, which a mistyped option should not wait for.
    from picardopt_3d.export.meshes import export_mesh
    from picardopt_3d.run.finished import open_scene, scene_file
    from picardopt_3d.scenes.gaussians import Gaussians

    if config.kind == "html":
        return _export_page(config)
    path = scene_file(config.run)
    folder = config.run if config.run.is_dir() else path.parent
    scene = open_scene(path, config.device)
    splats = scene.splats() if isinstance(scene, Gaussians) else None
    as_splats = splats is not None and config.kind in SPLATS
    name = ("splats." if as_splats else "mesh.") + config.kind.removeprefix("splats-")
    out = config.out or folder / name
    if out.is_dir():
        raise IsADirectoryError(f"out={str(out)!r} is a folder: give the file to write")
    if splats is not None and as_splats:
        return _export_splats(config, splats, out)
    earlier = _earlier_gaussians(config.run) if splats is None and config.kind in SPLATS else None
    if config.kind not in MESHES:
        other = "" if earlier is None else f"; for the run's Gaussians export {earlier}"
        raise ValueError(
            f"format {config.kind}: {path} is a {type(scene).__name__}, which holds no Gaussians; give "
            f"{', '.join(MESHES)}{other}"
        )
    if earlier is not None:
        print(
            f"note: this is a mesh of the run's {type(scene).__name__}; for its Gaussians export {earlier}",
            file=sys.stderr,
        )
    said = export_mesh(config, scene, out)
    if splats is None:
        return said
    return f"{said}, cut out of the density of {len(splats.means)} Gaussians on a grid of {config.resolution} cubed"


def _earlier_gaussians(run: Path) -> Path | None:
    """Returns the scene file of a stage before the last one that holds Gaussians, if a run has one."""
    from picardopt_3d.run.folder import RunFolder
    from picardopt_3d.scenes import Gaussians, load_scene

    for stage in RunFolder(run).begun()[-2::-1]:
        if stage.scene.is_file() and isinstance(load_scene(stage.scene), Gaussians):
            return stage.scene
    return None


def _export_page(config: ExportConfig) -> str:
    """Writes the page of a run, and returns the line to print."""
    from picardopt_3d.pages.viewer import save_viewer
    from picardopt_3d.run.finished import open_scene, read_run
    from picardopt_3d.run.folder import RunFolder

    if unused := config.of_meshes():
        raise ValueError(f"{', '.join(unused)}: of no use for format html; leave it out")
    if not config.run.is_dir():
        raise ValueError(f"format html: {config.run} is no folder of a run; give that")
    run, folder = read_run(config.run), RunFolder(config.run)
    out = config.out or folder.page
    said = save_viewer(folder, open_scene(run.scene, config.device), run.report, out)
    return f"{out}: {said}"


def _export_splats(config: ExportConfig, splats: Splats, out: Path) -> str:
    """Writes Gaussians, and returns the line to print."""
    from picardopt_3d.export.splats import save_splats

    if unused := config.of_meshes():
        raise ValueError(
            f"{', '.join(unused)}: of no use for format {config.kind}, which holds the Gaussians themselves; leave it "
            f"out, or give glb or obj for a mesh"
        )
    save_splats(splats, out, config.kind, config.up)  # type: ignore[arg-type]
    said = f"{out}: {len(splats.means)} Gaussians"
    if config.kind == "splat" and splats.harmonics.shape[1] > 0:
        said += ", without the part of their colours that depends on the direction, which the format cannot hold"
    if config.kind != "splats-glb" and config.up is None:
        said += ", z up as in the scene (most viewers expect --up minus-y)"
    return said
