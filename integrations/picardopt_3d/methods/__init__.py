"""Methods: one recipe per module, each with a frozen configuration, presets and a loss of (parameters, step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from picardopt_3d.methods import (
    dreamfusion,
    dreamgaussian_recipe,
    magic3d,
    prolificdreamer,
    textmesh,
    zero123,
    zero123_gaussians,
)
from picardopt_3d.methods.recipe import Context, NamedStage, RecipeConfig, StageConfig, stage_seed
from picardopt_3d.methods.stage import Stage

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "NamedStage",
    "RecipeConfig",
    "Stage",
    "StageConfig",
    "stage_seed",
]


@dataclass(frozen=True)
class Method:
    """A recipe as a command offers it.

    Attributes:
        config: The class of its configuration.
        presets: Its presets by name.
        had_one_stage: Whether an earlier version had its first stage alone, whose numbers kept configurations name
            without the stage.
    """

    config: type[RecipeConfig]
    presets: Mapping[str, RecipeConfig]
    had_one_stage: bool = False


METHODS: dict[str, dict[str, Method]] = {
    "text-to-3d": {
        "dreamfusion": Method(dreamfusion.DreamFusionConfig, dreamfusion.PRESETS),
        "textmesh": Method(textmesh.TextMeshConfig, textmesh.PRESETS),
        "magic3d": Method(magic3d.Magic3DConfig, magic3d.PRESETS),
        "dreamgaussian": Method(
            dreamgaussian_recipe.DreamGaussianRecipe,
            dreamgaussian_recipe.TEXT_PRESETS,
            had_one_stage=True,
        ),
        "prolificdreamer": Method(prolificdreamer.ProlificDreamerConfig, prolificdreamer.PRESETS),
    },
    "image-to-3d": {
        "zero123": Method(zero123.Zero123Config, zero123.PRESETS),
        "zero123-gaussians": Method(zero123.Zero123Config, zero123_gaussians.PRESETS),
        "dreamgaussian": Method(
            dreamgaussian_recipe.DreamGaussianRecipe,
            dreamgaussian_recipe.IMAGE_PRESETS,
            had_one_stage=True,
        ),
    },
}
"""The recipes of each command by name; the first one is its default. Two commands may share a name."""
