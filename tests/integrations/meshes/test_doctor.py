"""What the doctor says of the rasterizers of triangles."""

from __future__ import annotations

import pytest
import torch
from picardopt_3d.doctor import mesh_rasterizers as section
from picardopt_3d.doctor.mesh_rasterizers import _nvdiffrast, formula, mesh_rasterizers
from picardopt_3d.scenes.mesh import nvdiffrast_backend, rasterize, z_buffer


def test_a_rasterizer_that_draws_the_formula_is_in_order() -> None:
    ours = mesh_rasterizers()[0]
    assert (ours.name, ours.state) == ("torch-triangles", "ok")
    assert "differs from its formula by" in ours.detail


@pytest.mark.parametrize("fault", ["order of corners", "half a pixel", "not blended", "other side"])
def test_a_rasterizer_that_draws_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    edges, blend = z_buffer.edge_functions, rasterize.blend
    if fault == "order of corners":
        monkeypatch.setattr(z_buffer, "edge_functions", lambda *given: edges(*given)[::-1])
    elif fault == "half a pixel":
        monkeypatch.setattr(
            z_buffer,
            "edge_functions",
            lambda corners, row, column, *size: edges(corners, row, column + 0.5, *size),
        )
    elif fault == "not blended":
        monkeypatch.setattr(rasterize, "blend", lambda image, *given: image)
    else:
        monkeypatch.setattr(
            rasterize, "blend", lambda image, *given: 2 * image - blend(image, *given)
        )
    ours = mesh_rasterizers()[0]
    assert ours.state == "broken"
    assert "draws a wrong picture" in ours.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="nvdiffrast may be usable here")
def test_nvdiffrast_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent where it is not installed or has no GPU; broken where it should work and does not."""
    found = mesh_rasterizers()[-1]
    assert (found.name, found.state) == ("nvdiffrast-triangles", "absent")
    monkeypatch.setattr(nvdiffrast_backend, "installed", lambda: True)
    assert mesh_rasterizers()[-1].detail == "nvdiffrast needs CUDA, and this is cpu"
    monkeypatch.setattr(nvdiffrast_backend, "_trouble", lambda index: "nvdiffrast does not start")
    broken = _nvdiffrast(torch.device("cuda", 0), formula())
    assert broken == found._replace(state="broken", detail="nvdiffrast does not start")


def test_what_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(section, "formula", fails)
    (found,) = mesh_rasterizers()
    assert found.state == "broken"
    assert found.detail == "does not run: no such thing"
