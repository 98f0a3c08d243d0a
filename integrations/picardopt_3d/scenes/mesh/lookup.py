"""Colours of a texture at texture coordinates, and at points of the mesh that wears it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.screen import take_rows
from picardopt_3d.scenes.mesh.texels import texels_of
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped


def sampled(texture: Tensor, places: Tensor) -> Tensor:
    """Returns the colours of a texture, interpolated between the four texels around each place.

    Differentiable in both; gradients of texels are summed in an order that no thread changes.

    Args:
        texture: Logits of the colours, row 0 on top, `[size, size, 3]`.
        places: From the left and from the top, in [0, 1], `[count, 2]`; beyond the outermost centres colours are
            constant.

    Returns:
        RGB in [0, 1], `[count, 3]`.
    """
    size = len(texture)
    at = (places * size - 0.5).clamp(0, size - 1)
    low = at.detach().floor().clamp_max(max(0, size - 2)).long()
    column, row = (at - low).unbind(1)
    corner = low[:, 1] * size + low[:, 0]
    right, down = (1, size) if size > 1 else (0, 0)
    index = torch.cat([corner, corner + right, corner + down, corner + right + down])
    weights = torch.cat(
        [(1 - row) * (1 - column), (1 - row) * column, row * (1 - column), row * column]
    )
    colours = torch.sigmoid(take_rows(texture.reshape(-1, 3), index))
    return (weights[:, None] * colours).view(4, -1, 3).sum(0)


class Lookup:
    """The colours of a texture at points of the mesh that wears it; what finds them is made in the first call.

    Args:
        triangles: The mesh.
        unwrapped: Where its triangles lie on the texture.
        texture: Logits of the colours, row 0 on top, `[size, size, 3]`.
    """

    def __init__(self, triangles: Triangles, unwrapped: Unwrapped, texture: Tensor) -> None:
        self.triangles, self.unwrapped, self.texture = triangles, unwrapped, texture.detach()

    @cached_property
    @torch.no_grad()
    def _places(self) -> tuple[Any, Tensor]:
        """Returns a tree of points all over the mesh, and the triangle that each of them lies on."""
        from scipy.spatial import KDTree

        triangles = self.triangles
        texels = texels_of(self.unwrapped, len(self.texture))
        # The middles of the triangles too: the smallest ones cover no texel's centre.
        middles = triangles.vertices[triangles.faces].mean(1)
        everything = torch.arange(len(triangles.faces), device=middles.device)
        points = torch.cat([texels.points(triangles), middles])
        return KDTree(points.cpu().double().numpy()), torch.cat([texels.face, everything])

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """Returns the colours at points near the mesh, RGB in [0, 1], `[count, 3]`."""
        tree, faces = self._places
        nearest = torch.from_numpy(np.asarray(tree.query(points.cpu().double().numpy())[1]))
        face = faces[nearest.to(faces.device)]
        a, b, c = self.triangles.vertices[self.triangles.faces[face]].double().unbind(1)
        ab, ac, ap = b - a, c - a, points.double() - a
        bb, bc, cc = ((x * y).sum(1) for x, y in ((ab, ab), (ab, ac), (ac, ac)))
        bp, cp = (ab * ap).sum(1), (ac * ap).sum(1)
        area = (bb * cc - bc * bc).clamp_min(1e-30)
        shares = torch.stack([cc * bp - bc * cp, bb * cp - bc * bp], dim=1) / area[:, None]
        shares = torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1).clamp(0, 1)
        shares = (shares / shares.sum(1, keepdim=True)).float()
        places = self.unwrapped.coordinates[self.unwrapped.faces[face]]
        return sampled(self.texture, (shares[:, :, None] * places).sum(1))
