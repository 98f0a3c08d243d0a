"""The refinement of a mesh: what the guidance sees, the losses on triangles, and what is refused before step 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import random_cameras
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import losses
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.refine import RefineConfig, RefineWeights
from picardopt_3d.scenes import FieldConfig
from picardopt_3d.scenes.mesh.config import TetrahedralConfig

from tests.integrations.test_stages import build

FIELD = FieldConfig(resolutions=(4, 8), samples=8)
NO_MESH = RefineWeights(normal_consistency=0.0)


def config(**changes: Any) -> RefineConfig:
    numbers = {"steps": 4, "batch": 2, "pixels": 8, "scene": FIELD, "weights": NO_MESH} | changes
    return RefineConfig(
        guidance=GuidanceConfig("exact"),
        shading=ShadingConfig(diffuse_probability=0.0),
        **numbers,
    )


@pytest.mark.parametrize("name", ["normal_consistency", "laplacian"])
@pytest.mark.parametrize("weight", [1.0, ((0, 0.0), (3, 1.0))])
def test_a_loss_on_triangles_is_refused_where_there_are_none(name: str, weight: Any) -> None:
    weights = replace(NO_MESH, **{name: weight})
    with pytest.raises(ValueError, match=rf"^weights.{name}=.*: a FieldConfig has no triangles"):
        config(weights=weights)


def test_a_loss_on_normals_within_a_volume_is_refused_of_triangles() -> None:
    weights = replace(NO_MESH, orientation=1.0)
    with pytest.raises(ValueError, match=r"^weights.orientation=1.0: a TetrahedralConfig has no"):
        config(weights=weights, scene=TetrahedralConfig(resolution=4))


def test_what_the_guidance_sees_has_a_name() -> None:
    with pytest.raises(ValueError, match="shows='depth': give one of colour, normals"):
        config(shows="depth")


def test_the_guidance_sees_normals_over_the_scenes_background() -> None:
    stage: Any = build(
        config(shows="normals", scene=replace(FIELD, background=(0.2, 0.4, 0.6))), 0, None
    )
    seen: list[torch.Tensor] = []
    guidance = stage.guidance

    def look(views: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(views)
        return guidance(views, *rest)

    stage.guidance = look
    torch.manual_seed(0)
    found = stage.loss(0)
    (views,) = seen
    torch.manual_seed(0)
    cameras = random_cameras(2, stage.config.cameras)
    render = stage.scene.render(cameras, 8, jitter=True, normals=True, step=0)
    behind = torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    expected = (render.normal + render.opacity) / 2 + (1 - render.opacity) * behind
    torch.testing.assert_close(views, expected)
    assert (views - render.rgb).abs().max() > 0.05
    assert views.min() >= 0
    assert views.max() <= 1
    found.total.backward()


def test_opaqueness_counts_with_its_weight() -> None:
    totals = []
    for weight in (0.0, 2.0):
        stage: Any = build(config(weights=replace(NO_MESH, opaque=weight)), 0, None)
        torch.manual_seed(0)
        totals.append(stage.loss(0))
    plain, opaque = totals
    assert plain.terms.keys() == {"sds"}
    assert opaque.terms["opaque"] > 0
    torch.testing.assert_close(opaque.total, plain.total + 2 * opaque.terms["opaque"])
    assert losses.opaqueness(torch.zeros(1, 1, 2, 2)) < opaque.terms["opaque"]
