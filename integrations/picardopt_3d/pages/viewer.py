"""The page of a run: the object to turn, the film's views, the plot, the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.export.shown import shown
from picardopt_3d.export.turntable import film_pixels
from picardopt_3d.io import replacing
from picardopt_3d.pages.facts import headline, settings, stages
from picardopt_3d.pages.packed import packed
from picardopt_3d.pages.page import page
from picardopt_3d.pages.pictures import film_views, picture_in
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import Scene

_RESOLUTIONS = 48, 128
"""Fewest and most samples of a surface along each edge: between them, three for each pixel of the run's views."""

_USUAL_SIZE = 64
"""Pixels of views where a report does not say them."""


def save_viewer(
    folder: RunFolder, scene: Scene, report: Mapping[str, Any], path: Path | None = None
) -> str:
    """Writes the page of a run, atomically, and returns what of the object is on it.

    A scene without a surface has a page all the same, which says so.

    Args:
        folder: The run's, with film, sheet and plot.
        scene: What turns.
        report: The content of the run's report.
        path: The file to write; None: where every run has it.
    """
    (least, most), size = _RESOLUTIONS, int(report.get("size") or _USUAL_SIZE)
    resolution = min(max(3 * size, least), most)
    content, said = None, ""
    try:
        drawn = shown(scene, resolution=resolution)
        content, said = packed(drawn, film_pixels(size)) | {"view": _view(report)}, drawn.said
    except ValueError as error:  # empty, without a surface, or not finite
        said = f"There is no object to turn: {error}"
    html = page(
        "viewer.html",
        ("turn.js", "mesh.js", "splats.js", "object.js"),
        title=str(report.get("title") or folder.path.name),
        method=report.get("method"),
        preset=report.get("preset"),
        object=content,
        said=said,
        views=film_views(folder.film),
        headline=headline(report),
        settings=settings(report),
        stages=stages(report),
        sheet=picture_in(folder.sheet),
        plot=picture_in(folder.plot),
        picture=picture_in(folder.input),
        options=folder.config.read_text() if folder.config.is_file() else "",
    )
    with replacing(path or folder.page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return said


def _view(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns where the film was taken from: distance, field of view, elevation."""
    match report.get("view"):
        case [int() | float() as distance, int() | float() as fov]:
            camera = turntable_cameras(1, distance=distance, fov=fov)
        case _:
            camera = turntable_cameras(1)
    names = ("distance", "fov", "elevation")
    return {name: round(float(getattr(camera, name)[0]), 6) for name in names}
