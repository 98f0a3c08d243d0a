"""What a client is sent: its camera as ours, Gaussians, triangles, pictures at a size and a time, curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
import viser
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes import Gaussians, GaussiansConfig, Tetrahedral, TetrahedralConfig
from picardopt_3d.scenes.gaussians.splats import SH_C0
from picardopt_3d.viewer.cameras import camera_of
from picardopt_3d.viewer.display import Display
from picardopt_3d.viewer.pace import RESTS, Shown, Speed
from picardopt_3d.viewer.panel import Panel, medians, thinned
from picardopt_3d.viewer.parts import UPRIGHT, glb_of, splats_of
from picardopt_3d.viewer.server import LOOPBACK, serving

from tests.integrations.helpers.viewers import Client


def test_a_camera_of_a_client_is_ours() -> None:
    ours = orbit_cameras(25.0, -130.0, 1.7, 40.0)
    pose = ours.camera_to_world[0].double().numpy()
    opencv = pose[:3, :3] * np.array([1.0, -1.0, -1.0])
    wxyz = viser.transforms.SO3.from_matrix(opencv).wxyz
    found = camera_of(wxyz, pose[:3, 3], math.radians(40.0))
    for name in ("camera_to_world", "fov", "elevation", "azimuth", "distance"):
        torch.testing.assert_close(getattr(found, name), getattr(ours, name), rtol=1e-4, atol=1e-4)


def test_gaussians_are_sent_as_they_are() -> None:
    torch.manual_seed(0)
    scene = Gaussians(GaussiansConfig(count=7))
    with torch.no_grad():
        scene.rotations.copy_(torch.randn(7, 4))
        scene.log_scales.copy_(torch.randn(7, 3) - 3)
    centres, covariances, colours, opacities = splats_of(scene.splats())
    np.testing.assert_array_equal(centres, scene.means.detach().numpy())
    for index in range(7):
        wxyz = scene.rotations[index].detach().double().numpy()
        turn = viser.transforms.SO3(wxyz / np.linalg.norm(wxyz)).as_matrix()
        spread = np.diag(np.exp(2 * scene.log_scales[index].detach().numpy()))
        np.testing.assert_allclose(covariances[index], turn @ spread @ turn.T, rtol=1e-3, atol=1e-7)
    expected = (0.5 + SH_C0 * scene.colours.detach()).clamp(0, 1).numpy()
    np.testing.assert_allclose(colours, expected)
    np.testing.assert_allclose(opacities[:, 0], scene.opacity_logits.detach().sigmoid().numpy())


def test_triangles_stand_upright() -> None:
    scene = Tetrahedral(TetrahedralConfig(resolution=8))
    with torch.no_grad():
        scene.centre.copy_(torch.tensor([0.1, 0.2, 0.3]))
    loaded = trimesh.load(
        trimesh.util.wrap_as_stream(glb_of(scene)), file_type="glb", force="mesh", process=False
    )
    turned = viser.transforms.SO3(np.array(UPRIGHT)).as_matrix() @ np.asarray(loaded.vertices).T
    np.testing.assert_allclose(turned.T, scene.shell().triangles.vertices.numpy(), atol=1e-6)


def test_a_surface_that_has_vanished_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    scene = Tetrahedral(TetrahedralConfig(resolution=6))
    with serving(LOOPBACK, 0) as server:
        display, client = Display(server), Client(server.get_port())
        client.wait_for(server.get_clients)
        display.show(scene)
        display.serve()
        client.wait_for(lambda: client.of("GlbMessage"))
        with torch.no_grad():
            scene.distance.fill_(1.0)
        for _ in range(2):
            display.show(scene)
            display._sent.at = 0.0  # due again
            display.serve()
        client.close()
    assert capsys.readouterr().err.count("its surface has vanished") == 1


def test_nobody_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Gaussians(GaussiansConfig(count=3))
    monkeypatch.setattr(scene, "splats", lambda: pytest.fail("rendered for nobody"))
    with serving(LOOPBACK, 0) as server:
        display = Display(server)
        display.show(scene)
        display.serve()


def test_pictures_are_coarse_while_the_camera_moves_and_fine_when_it_rests() -> None:
    shown, now = Shown(), 1000.0
    assert shown.due(now, now, 0) == "coarse"
    shown = Shown(camera=now, scene=0, kind="coarse", at=now + 0.1, seconds=0.1)
    assert shown.due(now + 0.15, now, 0) is None  # the same view
    assert shown.due(now + 0.15, now + 0.12, 0) is None  # half of the time is the run's
    assert shown.due(now + 0.21, now + 0.12, 0) == "coarse"
    assert shown.due(now + 0.21 + RESTS, now, 0) == "fine"
    shown = Shown(camera=now, scene=0, kind="fine", at=now + 1.0, seconds=0.5)
    assert shown.due(now + 9.0, now, 0) is None  # nothing has changed
    assert shown.due(now + 5.4, now, 1) is None  # nine tenths of the time are the run's
    assert shown.due(now + 5.6, now, 1) == "fine"


def test_sizes_follow_the_speed() -> None:
    speed = Speed()
    for _ in range(20):
        speed.learn(10_000, 0.1)
    assert speed.size("coarse", 600, 800) == (77, 103)  # 0.08 s of 100,000 pixels a second
    assert speed.size("fine", 600, 800) == (194, 258)
    for _ in range(20):
        speed.learn(10_000_000, 0.1)
    assert speed.size("coarse", 600, 800) == (222, 296)
    assert speed.size("fine", 600, 800) == (600, 800)
    for _ in range(40):
        speed.learn(1, 100.0)
    height, width = speed.size("fine", 600, 800)
    assert 900 < height * width < 1200


def test_curves_are_thinned_and_gaps_are_left_out() -> None:
    values = np.arange(1.0, 2001.0)
    values[[3, 77]] = np.nan
    positions, found = thinned([values])
    assert len(positions) == len(found) == 400
    assert positions[-1] == 2000.0
    np.testing.assert_allclose(found.mean(), np.nanmean(values), rtol=1e-3)
    positions, found, other = thinned([np.array([1.0, np.nan, 3.0]), np.array([4.0, 5.0, 6.0])])
    assert (positions.tolist(), found.tolist(), other.tolist()) == ([1, 3], [1, 3], [4, 6])
    assert [each.size for each in thinned([np.full(3, np.nan)])] == [0, 0]


def test_text_is_escaped() -> None:
    with serving(LOOPBACK, 0) as server:
        panel = Panel(server, "<i>a {1 + 1} cube", "seed: <b>", None)
        panel.say([("state", "<u>")])
        client = Client(server.get_port())
        client.wait_for(lambda: any("seed" in text for text in client.texts()))
        client.close()
    together = "".join(client.texts())
    assert "&lt;i&gt;a {1 + 1} cube" in together
    assert "seed: &lt;b&gt;" in together
    assert "&lt;u&gt;" in together
    assert not client.of("GuiMarkdownMessage")  # which would take the braces for code


def test_medians_leave_out_what_has_no_logarithm() -> None:
    found = medians([[1.0, 3.0], [], [0.0], [math.inf], [2.0, 8.0, 5.0]])
    np.testing.assert_array_equal(found, [2.0, np.nan, np.nan, np.nan, 5.0])
