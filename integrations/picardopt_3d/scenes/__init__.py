"""Scenes: what is optimised and rendered."""

from .files import SceneConfig, build_scene, load_scene, save_scene
from .hash_grid import HashConfig, HashGrid
from .nerf import NerfConfig, NerfField
from .occupancy import OccupancyConfig, OccupancyGrid
from .radiance_field import FieldConfig, RadianceField
from .scene import Look, Scene
from .sdf import SdfConfig, SdfField
from .views import Light, Render

__all__ = [
    "FieldConfig",
    "HashConfig",
    "HashGrid",
    "Light",
    "Look",
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
    "load_scene",
    "save_scene",
]
