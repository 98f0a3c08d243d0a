"""Scenes: what a run trains and renders."""

from picardopt_3d.scenes.checks import caution_of, check_rasterizer, trained_groups
from picardopt_3d.scenes.field import Field, FieldSample
from picardopt_3d.scenes.files import (
    SceneConfig,
    build_scene,
    check_conversion,
    load_scene,
    save_scene,
)
from picardopt_3d.scenes.gaussians import Gaussians, GaussiansConfig, StrategyConfig
from picardopt_3d.scenes.hash_grid import HashConfig, HashGrid
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig
from picardopt_3d.scenes.mesh.tetrahedral import Tetrahedral
from picardopt_3d.scenes.mesh.textured import TexturedMesh
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.nerf import NerfConfig, NerfField
from picardopt_3d.scenes.occupancy import OccupancyConfig, OccupancyGrid
from picardopt_3d.scenes.radiance_field import FieldConfig, RadianceField
from picardopt_3d.scenes.scene import Scene, Shell, Surface
from picardopt_3d.scenes.sdf import SdfConfig, SdfField
from picardopt_3d.scenes.views import WHITE, Light, Render

__all__ = [
    "WHITE",
    "Field",
    "FieldConfig",
    "FieldSample",
    "Gaussians",
    "GaussiansConfig",
    "HashConfig",
    "HashGrid",
    "Light",
    "NerfConfig",
    "NerfField",
    "OccupancyConfig",
    "OccupancyGrid",
    "RadianceField",
    "Render",
    "Scene",
    "SceneConfig",
    "SdfConfig",
    "SdfField",
    "Shell",
    "StrategyConfig",
    "Surface",
    "Tetrahedral",
    "TetrahedralConfig",
    "TexturedMesh",
    "TexturedMeshConfig",
    "Triangles",
    "build_scene",
    "caution_of",
    "check_conversion",
    "check_rasterizer",
    "load_scene",
    "save_scene",
    "trained_groups",
]
