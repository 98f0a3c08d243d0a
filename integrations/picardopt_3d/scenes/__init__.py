"""Scenes: what is optimised and rendered."""

from .radiance_field import FieldConfig, RadianceField, Render, load_field, save_field

__all__ = ["FieldConfig", "RadianceField", "Render", "load_field", "save_field"]
