"""Pictures, the objects made from them sequentially and by Picard iteration, and the truth: the paper's Figure 6.

python benchmarks/methods.py && python benchmarks/side_by_side.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from methods import PICTURES, Run, configuration, subject
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.config import ImageTo3DConfig
from picardopt_3d.export.pictures import save_contact_sheet
from picardopt_3d.images import load_reference
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import load_scene
from picardopt_3d.world import render
from picardopt_3d.world.pictures import EXAMPLES

SIZE = 96
TURNS = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0)
"""Degrees from where the picture was taken."""


def rows(caption: str, scenes: Path) -> list[tuple[str, torch.Tensor]]:
    """One picture's part of the sheet."""
    config = configuration(Run("zero123", caption, "sequential"), scenes)
    assert isinstance(config, ImageTo3DConfig)
    distance, fov = config.recipe.cameras.middle
    picture = load_reference(
        config.image,
        elevation=config.elevation,
        azimuth=config.azimuth,
        distance=distance,
        fov=fov,
        framed=True,
    )
    around = config.azimuth + torch.tensor(TURNS)
    cameras = orbit_cameras(config.elevation, around, distance, fov)
    found = [("picture", picture.at(SIZE)[0][None])]
    for label, mode in (("sequential", "sequential"), ("Picard", "default")):
        scene = load_scene(RunFolder(Run("zero123", caption, mode).folder(scenes)).scene)
        found.append((label, render_rgb(scene, cameras, SIZE)))
    return [*found, ("true views", render(subject(caption), cameras, SIZE, SIZE)[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/image_to_3d.png"))
    options = parser.parse_args()
    shown = [each.caption for each, _, _ in EXAMPLES.values() if each.caption in PICTURES]
    sheet = [row for caption in shown for row in rows(caption, options.scenes)]
    title = (
        "image-to-3d, zero123 small: sequential, and Picard iteration at the defaults (window 8)"
    )
    save_contact_sheet(sheet, title, options.out)


if __name__ == "__main__":
    main()
