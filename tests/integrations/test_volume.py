from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.scenes import Light, OccupancyConfig, OccupancyGrid, nerfacc_sampling, sampling
from picardopt_3d.scenes.rays import Rays, ray_sphere
from picardopt_3d.scenes.sampling import Samples, sample
from picardopt_3d.scenes.volume import composite, cut_out, shade
from torch import Tensor

RADIUS = 0.5  # the corners of the views miss it


def rays_of(size: int = 9, views: int = 2) -> Rays:
    return Rays.of(*(x.double() for x in turntable_cameras(views).rays(size, size)))


def nothing(rays: Rays, samples: Samples, density: float = 0.0) -> tuple[Tensor, Tensor]:
    """A constant density, and black."""
    count = len(samples.points)
    return torch.full((count,), density, dtype=torch.float64), torch.zeros(3, count).double()


def test_a_constant_density_absorbs_exponentially_with_the_chord() -> None:
    rays, density = rays_of(), 1.7
    samples = sample(rays, RADIUS, 16, jitter=True)
    white = torch.ones(3, dtype=torch.float64)
    render = composite(rays, samples, *nothing(rays, samples, density), white)
    # The chord by elementary geometry: 2 sqrt(radius^2 - squared distance of the ray from the centre).
    beside = torch.linalg.cross(rays.origins, rays.directions).square().sum(1)
    length = 2 * (RADIUS**2 - beside).clamp_min(0).sqrt()
    assert 0 < (length > 0).sum() < len(length)
    through = torch.exp(-density * length)
    assert render.opacity.flatten() == pytest.approx((1 - through).numpy(), abs=1e-5)
    assert render.rgb[:, 0].flatten() == pytest.approx(through.numpy(), abs=1e-5)


def test_a_camera_inside_sees_what_is_before_it() -> None:
    origin, direction = torch.tensor([[[[0.0, 0.0, 0.2]]]]), torch.tensor([[[[0.0, 0.0, 1.0]]]])
    near, far = ray_sphere(Rays.of(origin, direction), RADIUS)
    assert (near.item(), far.item()) == pytest.approx((0.0, 0.3))
    near, far = ray_sphere(Rays.of(origin + 1, direction), RADIUS)
    assert near.item() == far.item()


def test_an_opaque_surface_is_seen_at_its_depth_and_hides_what_is_behind() -> None:
    rays = rays_of(3, 1)
    samples = sample(rays, RADIUS, 400, jitter=False)
    before = samples.points.norm(dim=1) < 0.3
    density, colour = before * 1e4, torch.stack([before, before, before]).double() * 0.25
    render = composite(rays, samples, density.double(), colour, torch.ones(3).double())
    assert render.rgb[0, :, 1, 1].tolist() == pytest.approx([0.25] * 3)
    assert render.depth[0, 0, 1, 1].item() == pytest.approx(1.65 - 0.3, abs=RADIUS / 200)


def test_jitter_moves_each_ray_within_its_strata_by_a_draw_of_its_own() -> None:
    rays = rays_of()
    regular = sample(rays, RADIUS, 8, jitter=False)
    torch.manual_seed(0)
    drawn = torch.rand(len(rays.origins), dtype=torch.float64)
    torch.manual_seed(0)
    moved = sample(rays, RADIUS, 8, jitter=True)
    shift = (moved.distance - regular.distance) / moved.delta
    expected = (drawn[moved.hit] - 0.5)[:, None].expand_as(shift)
    assert shift == pytest.approx(expected.numpy(), abs=1e-9)


def occupancy_of(values: Tensor) -> OccupancyGrid:
    grid = OccupancyGrid(OccupancyConfig(resolution=len(values)), RADIUS)
    grid.values.copy_(values)
    return grid


def test_culling_leaves_out_the_samples_in_empty_cells_and_no_others() -> None:
    rays = rays_of()
    values = torch.zeros(4, 4, 4)
    values[:, :, 2:] = 1.0  # x >= 0
    torch.manual_seed(0)
    everything = sample(rays, RADIUS, 12, jitter=True)
    torch.manual_seed(0)
    some = sample(rays, RADIUS, 12, True, occupancy_of(values))
    kept = everything.points[:, 0] >= 0
    assert some.where is not None
    assert 0 < len(some.points) < len(everything.points)
    assert torch.equal(some.points, everything.points[kept])
    assert torch.equal(some.rays(), everything.rays()[kept])
    density = torch.rand(len(everything.points)).double()
    colour = torch.rand(3, len(everything.points)).double()
    black = torch.zeros(3).double()
    culled = composite(rays, some, density[kept], colour[:, kept], black, colour[:, kept])
    zeroed = composite(rays, everything, density * kept, colour, black, colour)
    for name in ("rgb", "opacity", "depth", "normal", "orientation_penalty"):
        assert torch.allclose(getattr(culled, name), getattr(zeroed, name), atol=1e-12)
    most = kept.view(-1, 12).sum(1).max()
    assert some.distance.shape == (len(some.hit), most)  # empty samples have no place on the table


def test_rays_are_looked_up_some_at_a_time_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rays = rays_of()
    occupancy = occupancy_of(torch.rand(4, 4, 4).round())
    whole = sample(rays, RADIUS, 12, jitter=False, occupancy=occupancy)
    monkeypatch.setattr(sampling, "_AT_ONCE", 30)  # two rays of twelve samples
    parts = sample(rays, RADIUS, 12, jitter=False, occupancy=occupancy)
    for name in ("hit", "distance", "delta", "points", "where"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_rays_through_empty_space_have_no_samples() -> None:
    rays = rays_of()
    samples = sample(rays, RADIUS, 12, jitter=False, occupancy=occupancy_of(torch.zeros(4, 4, 4)))
    render = composite(
        rays, samples, torch.zeros(0), torch.zeros(3, 0), torch.ones(3), torch.zeros(3, 0)
    )
    assert len(samples.points) == 0
    assert (render.rgb == 1).all()
    assert render.orientation_penalty == 0


def test_light_falls_off_with_the_cosine_from_each_views_own_lamp() -> None:
    origins = torch.tensor([[[[0.0, 0.0, 2.0]]], [[[0.0, 2.0, 0.0]]]])
    rays = Rays.of(origins, -origins / 2)
    samples = sample(rays, RADIUS, 1, jitter=False)  # one sample a view, at the centre
    assert samples.points.abs().max() < 1e-6
    albedo = torch.tensor([[0.2, 0.4], [0.6, 0.8], [1.0, 0.0]])
    normal = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # z, then y
    position = torch.tensor([[0.0, 3.0, 3.0], [0.0, -1.0, 0.0]])  # at 45 degrees; behind
    lit = shade(albedo, normal, Light(position, ambient=0.3, diffuse=0.6), rays, samples)
    brightness = torch.tensor([0.3 + 0.6 * math.sqrt(0.5), 0.3])
    assert torch.allclose(lit, albedo * brightness)
    plain = shade(albedo, normal, Light(position, 0.3, 0.6, textureless=True), rays, samples)
    assert torch.allclose(plain, brightness.expand(3, 2))


def test_normals_that_face_away_are_penalized_by_weight_and_the_weights_are_left_alone() -> None:
    rays = rays_of(1, 1)
    samples = sample(rays, RADIUS, 2, jitter=False)
    density = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    along = rays.directions[0]
    tilted = torch.stack([0.5 * along, -along], 1).requires_grad_()  # away by half; towards
    black = torch.zeros(3).double()
    render = composite(rays, samples, density, torch.zeros(3, 2).double(), black, tilted)
    assert render.orientation_penalty is not None
    first = 1 - math.exp(-1.0 * RADIUS)  # weight of the first sample: half the chord is the radius
    assert render.orientation_penalty.item() == pytest.approx(first * 0.25)
    by_density, by_normal = torch.autograd.grad(
        render.orientation_penalty, (density, tilted), allow_unused=True
    )
    assert by_density is None
    assert by_normal[:, 0] == pytest.approx((2 * first * 0.5 * along).numpy())
    assert not by_normal[:, 1].any()


def test_a_background_stands_behind_its_own_view() -> None:
    rays = rays_of(2, 2)
    colours = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).double()
    samples = sample(rays, 1e-3, 2, jitter=False)
    render = composite(rays, samples, *nothing(rays, samples), rays.repeated(colours))
    assert torch.allclose(render.rgb, colours[:, :, None, None].expand(2, 3, 2, 2))


def test_what_is_cut_out_is_where_the_density_is_reached_inside_of_the_sphere() -> None:
    density = torch.tensor([9.9, 10.1, 50.0, 50.0], dtype=torch.float64)
    raw = torch.log(torch.expm1(density))
    inside = cut_out(raw, 10.0, torch.tensor([0.1, 0.1, 0.1, -0.1]).double())
    assert (inside > 0).tolist() == [False, True, True, False]
    assert inside[:2].tolist() == pytest.approx([-0.1, 0.1], rel=1e-3)  # it is linear in raw


def test_nerfacc_is_not_asked_for_without_cuda() -> None:
    assert not nerfacc_sampling.usable(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("occupied", [1.0, 0.3])
def test_nerfaccs_samples_give_the_plain_samples_picture(occupied: float) -> None:
    pytest.importorskip("nerfacc", minversion="0.5")
    torch.manual_seed(0)
    grid = occupancy_of((torch.rand(8, 8, 8) < occupied).float()).cuda()
    rays = Rays.of(*random_cameras(2, device="cuda").rays(16, 16))
    pictures = []
    for usable in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nerfacc_sampling, "usable", lambda device, usable=usable: usable)
            samples = sample(rays, RADIUS, 512, False, grid)
        assert grid.at(samples.points).float().mean() > 0.98
        density = 3.0 + 2.0 * samples.points[:, 0]
        colour = (0.5 + 0.5 * samples.points / RADIUS).T
        pictures.append(composite(rays, samples, density, colour, torch.ones(3).cuda()))
    for name in ("rgb", "opacity", "depth"):
        one, other = (getattr(picture, name) for picture in pictures)
        assert (one - other).abs().max() < 0.02
