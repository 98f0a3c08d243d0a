"""Guidance: score models, and the losses that they put on rendered views."""

from picardopt_3d.guidance.protocol import Guidance, NoisePair, Prompt, ScoreModel
from picardopt_3d.guidance.sds import ScoreDistillation, SdsConfig

__all__ = [
    "Guidance",
    "NoisePair",
    "Prompt",
    "ScoreDistillation",
    "ScoreModel",
    "SdsConfig",
]
