"""The built-in world: eight shapes in eight colours, rendered exactly, with captions.

The shipped guidance models are trained on these views, the tests use them as known answers, and a run that asks for one
of these objects is measured against them. What a user asks for otherwise never needs this package: of the product, only
`task` imports it (and the exact score, which is made of these views).
"""

from picardopt_3d.world.shapes import SHAPES
from picardopt_3d.world.subjects import (
    BACKGROUND,
    CAPTIONS,
    COLOURS,
    Subject,
    all_subjects,
    held_out_subjects,
    parse_prompt,
)
from picardopt_3d.world.views import colourize, render, render_shading, true_views

__all__ = [
    "BACKGROUND",
    "CAPTIONS",
    "COLOURS",
    "SHAPES",
    "Subject",
    "all_subjects",
    "colourize",
    "held_out_subjects",
    "parse_prompt",
    "render",
    "render_shading",
    "true_views",
]
