"""Density and colour of 3D Gaussians at points of space, and the surface that a mesh is extracted from.

The density at a point is the sum of the Gaussians' opacities, each times its Gaussian there, as in DreamGaussian
(arXiv 2309.16653, section 3.2). A Gaussian counts only within a box around it, so that a grid of points costs about
as much as the Gaussians' share of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats, check_finite, rotation_matrices
from picardopt_3d.scenes.scene import Surface

THRESHOLD = 0.3
"""Density at the surface.

Meshes of Gaussians fitted to true views of built-in shapes come closest to the truth at 0.2 to 0.6, those of score
distillation at 0.2 to 0.3. At 1, DreamGaussian's, they lie 0.01 to 0.02 deeper, and some have cavities.
"""

_NEGLIGIBLE = 1e-4  # what adds less to the density at a point may be left out there
_POINTS = 256  # points of a leaf: fewer cull better, more take fewer calls
_PAIRS = 1 << 19  # of a point and a Gaussian that are evaluated at once, to limit memory
_LOG_SCALES = (-14.0, 14.0)  # beyond these, numbers overflow that do not change the density


class Density:
    """Density and colour of 3D Gaussians at points, in memory that neither the points nor the Gaussians increase.

    Args:
        splats: The Gaussians. Those of any scale, rotation and opacity will do, as long as they are finite.

    Raises:
        ValueError: Values of the Gaussians are not finite.
    """

    @torch.no_grad()
    def __init__(self, splats: Splats) -> None:
        check_finite(splats)
        opacities = splats.opacity_logits.float().sigmoid()
        kept = opacities > _NEGLIGIBLE
        opacities = opacities[kept]
        self.means = splats.means[kept].float()
        turned = rotation_matrices(splats.rotations[kept].float())  # axes in columns
        scales = splats.log_scales[kept].float().clamp(*_LOG_SCALES).exp()
        self.whitening = turned.mT / scales[:, :, None]  # [count, 3, 3]
        colours = (0.5 + SH_C0 * splats.colours[kept].float()).clamp(0, 1)
        self.weights = opacities[:, None] * F.pad(colours, (1, 0), value=1.0)  # [count, 4]
        cut = (2 * (opacities / _NEGLIGIBLE).log()).sqrt()  # standard deviations
        reach = cut[:, None] * (turned * scales[:, None]).norm(dim=2)  # [count, 3]
        self.low, self.high = self.means - reach, self.means + reach

    def __call__(self, points: Tensor) -> Tensor:
        """Returns the density at points `[count, 3]`, `[count]`."""
        return self._at(points)[:, 0]

    def colour(self, points: Tensor) -> Tensor:
        """Returns the mean colour of the Gaussians at points, weighted by their shares in the density.

        Args:
            points: Positions, world units. [count, 3]

        Returns:
            RGB in [0, 1], black where there is no Gaussian. [count, 3]
        """
        sums = self._at(points)
        return sums[:, 1:] / sums[:, :1].clamp_min(1e-30)

    @torch.no_grad()
    def _at(self, points: Tensor) -> Tensor:
        """Returns the density, and the colours weighted by it, at points, `[count, 4]`."""
        everything = torch.arange(len(self.means), device=self.means.device)
        return self._sums(points.float(), everything)

    def _sums(self, points: Tensor, near: Tensor) -> Tensor:
        """Halves the points until few are left, each time forgetting the Gaussians that do not reach them.

        Args:
            points: Positions, world units. [count, 3]
            near: Indices of the Gaussians that may reach them.
        """
        sums = points.new_zeros(len(points), 4)
        if len(points) == 0:
            return sums
        low, high = points.amin(0), points.amax(0)
        near = near[((self.low[near] <= high) & (self.high[near] >= low)).all(1)]
        if len(near) == 0:
            return sums
        if len(points) <= _POINTS or len(points) * len(near) <= _PAIRS // 4:
            return self._leaf(points, near)
        order = points[:, (high - low).argmax()].argsort()
        for half in order.tensor_split(2):
            sums[half] = self._sums(points[half], near)
        return sums

    def _leaf(self, points: Tensor, near: Tensor) -> Tensor:
        """Evaluates every one of some Gaussians at every one of some points."""
        sums = points.new_zeros(len(points), 4)
        centre = points.mean(0)  # numbers relative to it are small, and their differences accurate
        for part in near.split(max(1, _PAIRS // len(points))):
            whitening = self.whitening[part]
            offsets = whitening @ (self.means[part] - centre)[:, :, None]  # [part, 3, 1]
            squared = (whitening @ (points - centre).T - offsets).square().sum(1)  # [part, points]
            sums += (-0.5 * squared).exp().T @ self.weights[part]
        return sums


def surface_of(splats: Splats, radius: float, threshold: float = THRESHOLD) -> Surface:
    """Returns the surface where the density of Gaussians is `threshold`.

    Args:
        splats: The Gaussians.
        radius: Radius of the sphere to look in, world units; what lies outside is cut off.
        threshold: Density at the surface.

    Raises:
        ValueError: Values of the Gaussians are not finite.
    """
    density = Density(splats)
    return Surface(
        radius, lambda points: density(points) - threshold, density.colour, splats.means.device
    )
