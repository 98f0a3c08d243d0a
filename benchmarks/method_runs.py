"""What `methods.py` runs: recipes, texts and pictures, modes, and the options of one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from picardopt_3d.config import ImageTo3DConfig, RunConfig, TextTo3DConfig
from picardopt_3d.methods import METHODS, Method, RecipeConfig
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.world import Subject, all_subjects

TEXTS = ("a blue chair", "a red cube", "a green snowman", "a yellow cone", "a cyan mug")
"""What text methods are asked for; the guidance model knows them all (`prompts.py` has held-out ones)."""
PICTURES: dict[str, tuple[float, float]] = {
    "a red chair": (20.0, 30.0),
    "a blue mug": (30.0, -50.0),
    "a green snowman": (15.0, 40.0),
    "a yellow cube": (25.0, 20.0),
    "a purple torus": (30.0, 0.0),
}
"""What the pictures of picture methods show, with elevation and azimuth in degrees."""
RECIPES = {
    "dreamfusion": ("text-to-3d", "dreamfusion", "small"),
    "dreamfusion-nerf": ("text-to-3d", "dreamfusion", "small-nerf"),
    "textmesh": ("text-to-3d", "textmesh", "small"),
    "magic3d": ("text-to-3d", "magic3d", "small"),
    "prolificdreamer": ("text-to-3d", "prolificdreamer", "small"),
    "dreamgaussian": ("text-to-3d", "dreamgaussian", "small"),
    "dreamgaussian-textured": ("text-to-3d", "dreamgaussian", "small"),
    "zero123": ("image-to-3d", "zero123", "small"),
    "zero123-gaussians": ("image-to-3d", "zero123-gaussians", "small"),
    "dreamgaussian-image": ("image-to-3d", "dreamgaussian", "small"),
    "dreamgaussian-image-textured": ("image-to-3d", "dreamgaussian", "small"),
}
"""Commands, methods and presets, by the name of their rows."""
FIRST_STAGE = {"dreamgaussian", "dreamgaussian-image"}
"""Rows of a method's first stage alone."""
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"sequential": True},
    "another seed": {"sequential": True, "seed": 1},
    "tolerance 0": {"window": 2, "tolerance": 0.0},
    "default": {"window": 8},
    "step-relative": {"window": 8, "tolerance": "step-relative"},
    "the paper's rule": {"window": 7},
}


@dataclass(frozen=True)
class Run:
    """One run of a recipe."""

    recipe: str
    caption: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.caption}/{self.mode}"

    def folder(self, scenes: Path) -> Path:
        return scenes / self.name.replace(" ", "-").replace("'", "")

    def sequential(self) -> Run:
        """The sequential run that this one is compared with."""
        return replace(self, mode="sequential")


def captions(recipe: str) -> tuple[str, ...]:
    """The texts, or the pictures' captions, that a recipe is run on."""
    command, _, _ = RECIPES[recipe]
    return TEXTS if command == "text-to-3d" else tuple(PICTURES)


def recipe_of(name: str) -> RecipeConfig:
    """What a row's runs are, all stages of it or the first."""
    command, method, preset = RECIPES[name]
    recipe = METHODS[command][method].presets[preset]
    return recipe.stages()[0].config if name in FIRST_STAGE else recipe


def stages_of(name: str) -> list[str]:
    """The stages of a row's runs, where there are several."""
    stages = recipe_of(name).stages()
    return [stage.name for stage in stages] if len(stages) > 1 else []


def by_the_papers_rule(recipe: RecipeConfig, method: Method) -> RecipeConfig:
    """A recipe whose stages have the window, tolerance and predictor of the method's paper preset."""
    published = [stage.config.picard for stage in method.presets["paper"].stages()]
    changed = {
        stage.name: replace(stage.config, picard=picard)
        for stage, picard in zip(recipe.stages(), published, strict=False)
    }
    if len(changed) == 1:
        (only,) = changed.values()
        return only
    whole: Any = recipe
    return replace(whole, **changed)


def configuration(run: Run, scenes: Path) -> RunConfig[Any]:
    """The run's options; by the paper's rule those of the method's paper preset, on the small one."""
    command, name, preset = RECIPES[run.recipe]
    recipe = recipe_of(run.recipe)
    if run.mode == "the paper's rule":
        recipe = by_the_papers_rule(recipe, METHODS[command][name])
    options: dict[str, Any] = MODES[run.mode] | {
        "out": run.folder(scenes),
        "method": name,
        "preset": preset,
        "recipe": recipe,
        "workers": 1,
        "picture_every": 0,
        "checkpoint_every": 0,
        "device": "cpu",
    }
    if command == "text-to-3d":
        return TextTo3DConfig(prompt=run.caption, **options)
    elevation, azimuth = PICTURES[run.caption]
    picture = RunFolder(run.folder(scenes)).input
    return ImageTo3DConfig(
        image=picture, elevation=elevation, azimuth=azimuth, subject=run.caption, **options
    )


def subject(caption: str) -> Subject:
    """The built-in world's subject."""
    return next(each for each in all_subjects() if each.caption == caption)
