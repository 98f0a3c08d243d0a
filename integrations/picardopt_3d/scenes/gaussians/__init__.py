"""3D Gaussians: a scene whose number of parameters changes."""

from picardopt_3d.scenes.gaussians.config import GaussiansConfig, Rasterizer, StrategyConfig
from picardopt_3d.scenes.gaussians.scene import Gaussians
from picardopt_3d.scenes.gaussians.splats import Splats

__all__ = ["Gaussians", "GaussiansConfig", "Rasterizer", "Splats", "StrategyConfig"]
