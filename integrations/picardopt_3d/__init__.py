"""Text-to-3D pipelines optimized in parallel time with picardopt."""

__version__ = "0.1.0"
