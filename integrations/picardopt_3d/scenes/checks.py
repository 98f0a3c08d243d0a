"""What can be known of a scene from its configuration, before there is a scene."""

from __future__ import annotations

import torch

from picardopt_3d.scenes.files import SceneConfig
from picardopt_3d.scenes.gaussians import GaussiansConfig, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats
from picardopt_3d.scenes.mesh import rasterize as mesh_rasterize
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig
from picardopt_3d.scenes.radiance_field import FieldConfig


def trained_groups(config: SceneConfig) -> dict[str, bool]:
    """Returns the names of a scene's groups of parameters, and whether there are any in each.

    Args:
        config: The scene's configuration.
    """
    if isinstance(config, GaussiansConfig):
        return {name: name != "harmonics" or config.degree > 0 for name in Splats._fields}
    if isinstance(config, FieldConfig):
        return {"encoding": True, "networks": False, "background": False}
    if isinstance(config, TexturedMeshConfig):
        return {"texture": config.trained != "shape", "offsets": config.trained != "colour"}
    field = {"encoding": True, "networks": True, "background": config.background == "neural"}
    if isinstance(config, TetrahedralConfig):
        coloured = config.trained != "shape"
        field = {name: trained and coloured for name, trained in field.items()}
        return {"shape": config.trained != "colour"} | field
    return field


def caution_of(config: SceneConfig) -> str | None:
    """Returns what a user must know of a run that trains a scene, in one line; None: nothing.

    Args:
        config: The scene's configuration.
    """
    if not isinstance(config, TetrahedralConfig | TexturedMeshConfig):
        return None
    if config.rasterizer != "nvdiffrast":
        return None
    return (
        "scene.rasterizer='nvdiffrast': its gradients do not repeat, so that the run is the sequential run at no "
        "tolerance, not even at 0, and its steps are not checked; 'torch', the default, repeats"
    )


def check_rasterizer(config: SceneConfig, device: torch.device) -> None:
    """Checks that what a scene is to be drawn with can be used.

    Args:
        config: The scene's configuration.
        device: Device of the scene.

    Raises:
        ValueError: It cannot be used on this device, or is not installed.
    """
    if isinstance(config, GaussiansConfig):
        rasterize.chosen(config.rasterizer, device)
    elif isinstance(config, TetrahedralConfig | TexturedMeshConfig):
        mesh_rasterize.check_usable(config.rasterizer, device)
