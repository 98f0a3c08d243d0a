"""Makes a mesh of a scene and writes it, as the command's options say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from picardopt_3d.export.mesh import coloured
from picardopt_3d.export.mesh_files import save_mesh
from picardopt_3d.export.textured import TexturedFile, check_beside, save_textured
from picardopt_3d.scenes import Scene, TexturedMesh, TexturedMeshConfig
from picardopt_3d.scenes.mesh.bake import bake
from picardopt_3d.scenes.mesh.extract import points_of, triangles_of
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped, unwrap
from picardopt_3d.scenes.mesh.viewpoints import VIEWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from picardopt_3d.export.command import ExportConfig

_FACES = TexturedMeshConfig.faces
"""Triangles that a mesh is simplified to before it is unwrapped, if nothing else is asked for."""

_VIEW_PIXELS = 256
"""Most pixels along each edge of the views that a texture is baked from."""


def export_mesh(config: ExportConfig, scene: Scene, out: Path) -> str:
    """Writes a scene as a mesh, and returns the line to print.

    Args:
        config: The command's options.
        scene: The scene.
        out: The file to write.

    Raises:
        ValueError: The scene has no surface, or an option is of no use for it.
        FileExistsError: See `check_beside`.
    """
    shell = scene.shell()
    own = shell is not None
    if own and (unused := [f for f in config.of_meshes() if f in ("--resolution", "--level")]):
        raise ValueError(
            f"{', '.join(unused)}: of no use for a {type(scene).__name__}, which has triangles of its own; leave it out"
        )
    kept = isinstance(scene, TexturedMesh) and config.texture is None and config.kind != "ply"
    if config.kind == "obj" and (kept or config.texture is not None):
        check_beside(out)  # before minutes of work
    if isinstance(scene, TexturedMesh) and kept:
        changing = [f for f in config.of_meshes() if f in ("--components", "--faces")]
        if changing:
            raise ValueError(
                f"{' and '.join(changing)} {'changes' if len(changing) == 1 else 'change'} the mesh, which its texture "
                f"then no longer fits: give --texture {scene.config.texture} too, to bake a new one"
            )
        return _write(config, TexturedFile.of_scene(scene), out)
    triangles = _triangles(config, scene, own)
    if config.texture is not None:
        return _write(config, _baked(scene, triangles, config.texture, own), out)
    colour, device = (shell or scene.surface()).colour, scene.device
    mesh = coloured(triangles, colour, device)
    save_mesh(mesh, out, config.kind, config.up)  # type: ignore[arg-type]
    return f"{out}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles"


def _triangles(config: ExportConfig, scene: Scene, own: bool) -> Triangles:
    """Returns the scene's triangles; `own`: whether it consists of them."""
    faces = config.faces or (_FACES if config.texture is not None else None)
    options: dict[str, Any] = {"components": config.components, "faces": faces}
    if own:
        return triangles_of(scene, **options)
    options |= {"resolution": config.resolution, "level": config.level}
    with _bar("surface", points_of(config.resolution), "point") as progress:
        return triangles_of(scene, **options, progress=progress)


def _baked(scene: Scene, triangles: Triangles, size: int, own: bool) -> TexturedFile:
    """Unwraps a mesh and bakes its texture; `own`: whether the scene consists of triangles."""
    with _bar("unwrap", len(triangles.faces), "triangle") as progress:
        unwrapped = unwrap(triangles, size, progress=progress)
    triangles = Triangles(*(part.to(scene.device) for part in triangles))
    unwrapped = Unwrapped(*(part.to(scene.device) for part in unwrapped))
    settings = TexturedMeshConfig(texture=size, view_pixels=min(size, _VIEW_PIXELS))
    if own:  # the colours are known without views
        return TexturedFile.of(triangles, unwrapped, bake(triangles, unwrapped, scene, settings))
    with _bar("bake", VIEWS, "view") as progress:
        colours = bake(triangles, unwrapped, scene, settings, progress=progress)
    return TexturedFile.of(triangles, unwrapped, colours)


def _write(config: ExportConfig, mesh: TexturedFile, out: Path) -> str:
    """Writes a mesh with a texture, and returns the line to print."""
    files = save_textured(mesh, out, config.kind, config.up)  # type: ignore[arg-type]
    said = f"{out}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles, texture of {len(mesh.texture)} pixels"
    others = [file.name for file in files if file != out]
    return f"{said}, with {' and '.join(others)} beside it" if others else said


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Shows a bar, and yields what is called with each advance; its clock goes on at advances of 0."""
    with tqdm(total=total, desc=what, unit=unit, unit_scale=total >= 1000) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            if count == 0:
                bar.refresh()

        yield advance
