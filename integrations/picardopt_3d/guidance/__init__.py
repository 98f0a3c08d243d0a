"""Guidance: score models, and the losses that they put on rendered views.

Import `PixelDiffusion` from `picardopt_3d.guidance.pixel_diffusion`: it needs diffusers, which takes seconds to import
and which the rest does without.
"""

from picardopt_3d.guidance.exact_score import ExactScore, KnownViews, RenderedSubjects
from picardopt_3d.guidance.loss_config import DenoiseConfig, SdsConfig, VsdConfig
from picardopt_3d.guidance.protocol import (
    Conditions,
    Encoded,
    EncodedImage,
    EncodedText,
    Guidance,
    Prediction,
    ScoreModel,
)
from picardopt_3d.guidance.schedule import TimestepSchedule
from picardopt_3d.guidance.sds import ScoreDistillation

__all__ = [
    "Conditions",
    "DenoiseConfig",
    "Encoded",
    "EncodedImage",
    "EncodedText",
    "ExactScore",
    "Guidance",
    "KnownViews",
    "Prediction",
    "RenderedSubjects",
    "ScoreDistillation",
    "ScoreModel",
    "SdsConfig",
    "TimestepSchedule",
    "VsdConfig",
]
