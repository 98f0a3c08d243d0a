"""Zero-1-to-3 with 3D Gaussians: the recipe of `zero123` on another kind of scene.

`PAPER` puts together what DreamPropeller published (its Table 4 and appendix D): steps, batch, Gaussians, rates, sizes
and tolerance of its "3DGS", with the losses, guidance, noise levels and cameras of its Zero-1-to-3. (Its own "3DGS" is
DreamGaussian from a picture, with DreamGaussian's losses: `dreamgaussian.PAPER_IMAGE`.) Gaussians have no normals in
space, so that the losses on normals are off.
"""

from __future__ import annotations

from dataclasses import replace

from picardopt_3d.guidance import TimestepSchedule
from picardopt_3d.methods import dreamgaussian, zero123
from picardopt_3d.methods.zero123 import Zero123Config, Zero123Weights
from picardopt_3d.scenes import GaussiansConfig

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
    reference_pixels=dreamgaussian.PAPER_IMAGE.reference_pixels,
    # Score distillation has a weight of 0.1 here, 1 there: gradients are as much smaller.
    scene=GaussiansConfig(
        strategy=replace(dreamgaussian.STRATEGY, every=100, gradient=0.1 * 16 * 0.5), across=True
    ),
    rates=dreamgaussian.PAPER_IMAGE.rates,
    geometric=("means",),
    betas=dreamgaussian.PAPER_IMAGE.betas,
    eps=1e-15,
    # Half of the run, as 600 of 1200 steps with a radiance field.
    timesteps=TimestepSchedule(low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 250)),
    weights=_WEIGHTS,
    picard=dreamgaussian.PAPER_IMAGE.picard,
)

PRESETS = {"small": SMALL, "paper": PAPER}
