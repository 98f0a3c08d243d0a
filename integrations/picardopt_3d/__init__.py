"""Text-to-3D pipelines optimized in parallel time with picardopt."""

from importlib.metadata import version

__version__ = version("picardopt-3d")
