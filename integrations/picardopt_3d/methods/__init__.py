"""Methods: one recipe per module, each with a frozen configuration, presets and a loss of (parameters, step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from picardopt_3d.methods import dreamfusion, textmesh, zero123
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
    """A recipe as the commands offer it.

    Attributes:
        command: The command that runs it, "text-to-3d" or "image-to-3d".
        config: The class of its configuration.
        presets: Its presets by name.
    """

    command: str
    config: type[StageConfig]
    presets: Mapping[str, StageConfig]


METHODS: dict[str, Method] = {
    "dreamfusion": Method("text-to-3d", dreamfusion.DreamFusionConfig, dreamfusion.PRESETS),
    "textmesh": Method("text-to-3d", textmesh.TextMeshConfig, textmesh.PRESETS),
    "zero123": Method("image-to-3d", zero123.Zero123Config, zero123.PRESETS),
}
"""The recipes by name; the first recipe of a command is its default."""
