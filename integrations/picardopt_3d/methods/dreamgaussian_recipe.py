"""DreamGaussian (arXiv 2309.16653): Gaussians from a text or from a picture, then a mesh whose texture is refined."""

from __future__ import annotations

from dataclasses import dataclass

from picardopt_3d.methods import dreamgaussian, dreamgaussian_texture
from picardopt_3d.methods.dreamgaussian import DreamGaussianConfig
from picardopt_3d.methods.dreamgaussian_texture import DreamGaussianTextureConfig
from picardopt_3d.methods.recipe import RecipeConfig


@dataclass(frozen=True, kw_only=True)
class DreamGaussianRecipe(RecipeConfig):
    """The configuration of both stages.

    Attributes:
        gaussians: The Gaussians, by score distillation.
        texture: The mesh that is made of them, by image-to-image denoising.
    """

    gaussians: DreamGaussianConfig
    texture: DreamGaussianTextureConfig


TEXT_PRESETS = {
    "small": DreamGaussianRecipe(
        gaussians=dreamgaussian.SMALL, texture=dreamgaussian_texture.SMALL
    ),
    "paper": DreamGaussianRecipe(
        gaussians=dreamgaussian.PAPER, texture=dreamgaussian_texture.PAPER
    ),
}
IMAGE_PRESETS = {
    "small": DreamGaussianRecipe(
        gaussians=dreamgaussian.SMALL_IMAGE, texture=dreamgaussian_texture.SMALL_IMAGE
    ),
    "paper": DreamGaussianRecipe(
        gaussians=dreamgaussian.PAPER_IMAGE, texture=dreamgaussian_texture.PAPER_IMAGE
    ),
}
