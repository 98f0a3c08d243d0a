"""Objects made sequentially and by Picard iteration, beside their pictures and the truth: the paper's Figure 6.

    python benchmarks/side_by_side.py --all        # every method once: docs/images/methods.png
    python benchmarks/side_by_side.py --recipe magic3d --captions "a blue chair"    # docs/images/magic3d.png

Shows the scenes that `methods.py` left in build/methods; runs that are missing there are made first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from method_runs import PICTURES, RECIPES, TEXTS, Run, captions, configuration, subject
from methods import optimize
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.config import RunConfig
from picardopt_3d.export.pictures import save_contact_sheet, tile
from picardopt_3d.io import replacing
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import load_scene
from picardopt_3d.world import render
from picardopt_3d.world.pictures import EXAMPLES
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
TURNS = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0)
"""Degrees from where the picture was taken, or from the front."""
FEW_TURNS = (20.0, 140.0, 260.0)
"""Those of the sheet of all methods."""
MARGIN, HEAD, GAP = 136, 34, 18
"""Pixels beside, above and between the groups of views in that sheet."""
SHOWN = {"sequential": "sequential", "Picard": "default"}
"""Modes of `methods.py`, by their label."""
METHODS_SHOWN = {
    "dreamfusion": ("DreamFusion", "voxels"),
    "magic3d": ("Magic3D", "tetrahedral mesh"),
    "textmesh": ("TextMesh", "signed distance"),
    "dreamgaussian-textured": ("DreamGaussian", "textured mesh"),
    "prolificdreamer": ("ProlificDreamer", "tetrahedral mesh"),
    "zero123": ("Zero-1-to-3", "radiance field"),
    "zero123-gaussians": ("Zero-1-to-3", "3D Gaussians"),
}
"""Systems and their last stage's kind of scene, by the recipes of `methods.py`."""


def finished(run: Run, scenes: Path) -> list[StageFolder]:
    """The stages of a run, which is made first if it is missing or was stopped."""
    config = configuration(run, scenes)
    stages, begun = config.recipe.stages(), RunFolder(config.out).begun()
    if len(begun) < len(stages) or RunRecord.load(begun[-1]).step < stages[-1].config.steps:
        optimize((run, scenes))
    return RunFolder(config.out).begun()


def cameras_around(config: RunConfig[Any], turns: Sequence[float]) -> Cameras:
    """Cameras around a run's object, as far away as in training."""
    view = config.recipe.stages()[-1].config.cameras.middle
    elevation, azimuth = config.task.sheet_view
    return orbit_cameras(elevation, azimuth + torch.tensor(turns), *view)


def rows(recipe: str, caption: str, scenes: Path) -> list[tuple[str, torch.Tensor]]:
    """One object's part of a method's picture: its stages, where there are several, one by one."""
    config = configuration(Run(recipe, caption, "sequential"), scenes)
    stages, cameras = config.recipe.stages(), cameras_around(config, TURNS)
    found = []
    for label, mode in SHOWN.items():
        folders = finished(Run(recipe, caption, mode), scenes)
        for stage, folder in zip(stages, folders, strict=True):
            name = f"{label}:\n{stage.name}" if len(stages) > 1 else label
            found.append((name, render_rgb(load_scene(folder.scene), cameras, SIZE)))
    view = stages[-1].config.cameras.middle
    reference = config.task.reference(RunFolder(config.out).input, *view)
    if reference is not None:
        found.insert(0, ("picture", reference.at(SIZE)[0][None]))
    return [*found, ("true views", render(subject(caption), cameras, SIZE, SIZE)[0])]


def views_of_method(recipe: str, scenes: Path) -> list[torch.Tensor]:
    """A few views of one object: of each mode's last scene, and the true ones."""
    caption = captions(recipe)[0]
    cameras = cameras_around(configuration(Run(recipe, caption, "sequential"), scenes), FEW_TURNS)
    found = []
    for mode in SHOWN.values():
        scene = load_scene(finished(Run(recipe, caption, mode), scenes)[-1].scene)
        found.append(render_rgb(scene, cameras, SIZE))
    return [*found, render(subject(caption), cameras, SIZE, SIZE)[0]]


def save_sheet_of_all(found: dict[str, list[torch.Tensor]], path: Path) -> None:
    """A row for each method, with its names on the left; a group of columns for each mode, and one for the truth."""
    groups = [tile(views) for views in zip(*found.values(), strict=True)]
    height, width, _ = groups[0].shape
    size = (MARGIN + len(groups) * (width + GAP), HEAD + height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(size=16), ImageFont.load_default(size=14)
    heads = ("sequential", "Picard, window 8", "true views")
    for index, (title, pixels) in enumerate(zip(heads, groups, strict=True)):
        left = MARGIN + index * (width + GAP)
        sheet.paste(Image.fromarray(pixels), (left, HEAD))
        draw.text((left + width / 2, HEAD / 2), title, fill="black", font=large, anchor="mm")
    for index, recipe in enumerate(found):
        (name, kind), middle = METHODS_SHOWN[recipe], HEAD + (index + 0.5) * height / len(found)
        draw.text((12, middle - 10), name, fill="black", font=large, anchor="lm")
        draw.text((12, middle + 10), kind, fill="dimgray", font=small, anchor="lm")
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="one object of every method")
    which.add_argument("--recipe", choices=tuple(RECIPES), default="zero123")
    parser.add_argument("--captions", nargs="+", help="objects of a recipe; three if left out")
    parser.add_argument("--scenes", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, help="docs/images/RECIPE.png, or methods.png")
    options = parser.parse_args()
    known = () if options.all else captions(options.recipe)
    if not set(options.captions or ()) <= set(known):
        parser.error(f"--captions {options.captions}: choose from {known}")
    out = options.out or Path(f"docs/images/{'methods' if options.all else options.recipe}.png")
    torch.set_num_threads(1)
    if options.all:
        found = {recipe: views_of_method(recipe, options.scenes) for recipe in METHODS_SHOWN}
        save_sheet_of_all(found, out)
    else:
        command, method, preset = RECIPES[options.recipe]
        shown = [each.caption for each, _, _ in EXAMPLES.values() if each.caption in PICTURES]
        if command == "text-to-3d":
            shown = list(TEXTS[:3])
        shown = options.captions or shown
        sheet = [row for caption in shown for row in rows(options.recipe, caption, options.scenes)]
        title = f"{method} {preset}: sequential, and Picard (window 8)"
        save_contact_sheet(sheet, title, out)


if __name__ == "__main__":
    main()
