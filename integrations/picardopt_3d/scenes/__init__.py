"""Scenes: what is optimised and rendered."""

from .files import SceneConfig, build_scene, load_field, load_scene, save_field, save_scene
from .hash_grid import HashConfig, HashGrid
from .nerf import NerfConfig, NerfField
from .occupancy import OccupancyConfig, OccupancyGrid
from .protocol import Light, Render, Scene
from .radiance_field import FieldConfig, RadianceField
from .sdf import SdfConfig, SdfField

__all__ = [
    "FieldConfig",
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
    "build_scene",
    "load_field",
    "load_scene",
    "save_field",
    "save_scene",
]
