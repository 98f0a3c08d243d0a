"""Rasterizing triangles in plain torch: against rays, against finite differences, and what must not change a bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.mesh.rasterize import interpolate, rasterize

from tests.integrations.helpers.triangles import exact, random_triangles, seen_by_rays

CAMERAS = exact(orbit_cameras(torch.tensor([-10.0, 30.0, 89.0]), torch.tensor([0.0, 130.0, -70.0])))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("height", "width"), [(24, 24), (17, 40), (33, 8)])
def test_shows_what_rays_hit(seed: int, height: int, width: int) -> None:
    triangles = random_triangles(20, seed=seed)
    face, shares, distance = seen_by_rays(triangles, CAMERAS, height, width)
    found = rasterize(triangles, CAMERAS, height, width)
    assert (face >= 0).mean() > 0.15  # the test sees something
    np.testing.assert_array_equal(found.face.numpy(), face)
    np.testing.assert_allclose(found.barycentric.numpy(), shares, atol=1e-9)
    points = interpolate(found, triangles.faces, triangles.vertices).numpy()
    origins, directions = (x.numpy() for x in CAMERAS.rays(height, width))
    seen = face >= 0
    expected = origins[seen] + distance[seen][:, None] * directions[seen]
    np.testing.assert_allclose(points[seen], expected, atol=1e-9)
