"""Zero-1-to-3 with 3D Gaussians: the recipe of `zero123` on another kind of scene.

`PAPER` has DreamPropeller's settings (its Table 4, "3DGS", and appendix D): 500 steps of 16 views on the Gaussians,
rates and sizes of DreamGaussian's released code, with the losses and noise levels of Zero-1-to-3. Gaussians have no
normals in space, so that the losses on normals are off.
"""

from __future__ import annotations

from dataclasses import replace

from picardopt_3d.guidance import TimestepSchedule
from picardopt_3d.methods import dreamgaussian, zero123
from picardopt_3d.methods.zero123 import Zero123Config, Zero123Weights

_WEIGHTS = Zero123Weights(normal_smoothness=0.0, normal_smoothness_3d=0.0, orientation=0.0)

SMALL = replace(
    zero123.SMALL,
    scene=dreamgaussian.SMALL_IMAGE.scene,
    rates=dreamgaussian.SMALL_IMAGE.rates,
    geometric=("means",),
    eps=1e-15,
    weights=_WEIGHTS,
)

PAPER: Zero123Config = replace(
    zero123.PAPER,
    steps=500,
    batch=16,
    pixels=dreamgaussian.PAPER_IMAGE.pixels,
    reference_pixels=((0, 128), (150, 256), (300, 512)),
    scene=dreamgaussian.PAPER_IMAGE.scene,
    rates=dreamgaussian.PAPER_IMAGE.rates,
    geometric=("means",),
    betas=dreamgaussian.PAPER_IMAGE.betas,
    eps=1e-15,
    timesteps=TimestepSchedule(low=(0.4, 0.2), high=(0.85, 0.5)),
    weights=_WEIGHTS,
    picard=dreamgaussian.PAPER_IMAGE.picard,
)

PRESETS = {"small": SMALL, "paper": PAPER}
