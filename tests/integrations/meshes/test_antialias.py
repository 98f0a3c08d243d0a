"""Antialiased silhouettes: against areas in closed form, against finite differences, and what they must leave alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes.mesh.antialias import adjacent, blend
from picardopt_3d.scenes.mesh.rasterize import antialias, interpolate, rasterize
from picardopt_3d.scenes.mesh.screen import Screen
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

from tests.integrations.helpers.triangles import exact, grid, random_triangles, sphere

CAMERA = exact(orbit_cameras(0.0, 0.0))  # on the x axis: y to the right, z up
TILTED = exact(orbit_cameras(torch.tensor([21.3, -8.0]), torch.tensor([33.1, 190.4])))


def focal(size: int) -> float:
    """Of `CAMERA`, pixels."""
    return 0.5 * size / math.tan(math.radians(float(CAMERA.fov)) / 2)


def coverage(triangles: Triangles, seen_by: Cameras, size: int, blended: bool = True) -> Tensor:
    """The picture of a white mesh before black."""
    found = rasterize(triangles, seen_by, size, size)
    white = (found.face >= 0).to(triangles.vertices)[..., None]
    return antialias(white, found, triangles, seen_by) if blended else white


def on_screen(vertices: Tensor, size: int) -> Tensor:
    """Where `CAMERA` sees vertices, pixels from the picture's middle, y up."""
    return focal(size) * vertices[:, 1:] / (CAMERA.distance - vertices[:, :1])


def area_of_triangle(vertices: Tensor, size: int) -> Tensor:
    one, two = on_screen(vertices, size).diff(dim=0)
    return 0.5 * (one[0] * two[1] - one[1] * two[0]).abs()


def slopes(value: Tensor, vertices: Tensor) -> Tensor:
    return torch.autograd.grad(value, vertices)[0]


@pytest.mark.parametrize("turn", range(0, 360, 23))
def test_a_straight_edge_covers_its_area(turn: int) -> None:
    """At any angle: each row that a steep edge crosses has what lies beside it, exactly, and changes as that does."""
    size, angle = 16, math.radians(turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    pixel = float(CAMERA.distance) / focal(size)
    normal = torch.tensor([0.0, cosine, sine], dtype=torch.float64)
    along = torch.tensor([0.0, -sine, cosine], dtype=torch.float64)
    shift = torch.tensor(0.371, dtype=torch.float64, requires_grad=True)  # pixels
    ends = [shift * pixel * normal + 9 * along, shift * pixel * normal - 9 * along, -40 * normal]
    image = coverage(Triangles(torch.stack(ends), torch.tensor([[0, 1, 2]])), CAMERA, size)
    image = image[0, :, :, 0].flip(0)  # row 0 below
    if abs(cosine) < abs(sine):
        image, cosine, sine = image.T, sine, cosine
    place = torch.arange(size, dtype=torch.float64) + 0.5 - 0.5 * size
    crossing = (shift - place * sine) / cosine
    inner = crossing.abs() < 0.5 * size - 1
    assert inner.sum() > size // 2
    expected = 0.5 * size + math.copysign(1, cosine) * crossing
    torch.testing.assert_close(image.sum(1)[inner], expected[inner])
    (slope,) = torch.autograd.grad(image.sum(1)[inner].sum(), shift)
    assert float(slope) == pytest.approx(int(inner.sum()) / abs(cosine))


@pytest.mark.parametrize("seed", range(8))
def test_a_triangle_covers_its_area(seed: int) -> None:
    """But at its corners, which are not seen; a step larger than a pixel there would be a fault of an edge."""
    size = 64
    generator = torch.Generator().manual_seed(seed)
    angles = 2.1 * torch.arange(3, dtype=torch.float64) + torch.rand(1, generator=generator)
    plane = 0.42 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    depth = 0.2 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
    vertices = torch.cat([depth, plane], dim=-1).requires_grad_()
    triangles = Triangles(vertices, torch.tensor([[0, 1, 2]]))
    expected = area_of_triangle(vertices, size)
    found = coverage(triangles, CAMERA, size).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1.5)
    ours, theirs = slopes(found, vertices), slopes(expected, vertices)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.06


def test_a_moving_silhouette_uncovers_smoothly() -> None:
    """A square that slides by a pixel: its sharp area jumps by rows, the blended one stays."""
    size, sheet = 32, grid(1, 0.7)
    pixel = float(CAMERA.distance) / focal(size)
    expected = (0.7 / pixel) ** 2
    sharp, blended = [], []
    for step in torch.linspace(0, 1, 12, dtype=torch.float64):
        moved = Triangles(sheet.vertices + step * pixel * torch.tensor([0, 1.0, 0.37]), sheet.faces)
        sharp.append(float(coverage(moved, CAMERA, size, blended=False).sum()))
        blended.append(float(coverage(moved, CAMERA, size).sum()))
    assert max(sharp) - min(sharp) > 10
    assert all(
        abs(area - expected) < 0.3 for area in blended
    )  # 0.25 at each of the corners at most


@pytest.mark.parametrize(("subdivisions", "size"), [(2, 48), (3, 48), (4, 48), (4, 64), (5, 64)])
def test_faces_smaller_than_a_pixel_have_silhouettes_too(subdivisions: int, size: int) -> None:
    """The outline of a sphere: its area as in a picture of 12 times the size, and how it grows with the radius."""
    ball = sphere(subdivisions)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = coverage(Triangles(ball.vertices * scale, ball.faces), CAMERA, size).sum()
    expected = float(coverage(ball, CAMERA, 12 * size, blended=False).sum()) / 144
    assert found.item() == pytest.approx(expected, rel=0.003)
    slope = float(torch.autograd.grad(found, scale)[0])
    grown = 2 * expected * (1 + 0.25 / (float(CAMERA.distance) ** 2 - 0.25))
    assert slope == pytest.approx(grown, rel=0.05)


def attributes(triangles: Triangles, values: Tensor, seen_by: Cameras, size: int) -> Tensor:
    found = rasterize(triangles, seen_by, size, size)
    image = interpolate(found, triangles.faces, values) + 0.3
    return antialias(image, found, triangles, seen_by)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["loose", "closed", "sheet"])
def test_gradcheck_with_silhouettes(seed: int, shape: str) -> None:
    """Of the vertices and of the values: the picture is differentiable until another face is seen."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"loose": random_triangles(3, seed=seed), "closed": sphere(0), "sheet": grid(2, 0.8)}
    triangles = shapes[shape]
    noise = torch.randn(triangles.vertices.shape, generator=generator, dtype=torch.float64)
    vertices = (triangles.vertices + 0.03 * noise).requires_grad_()
    values = torch.randn(
        len(vertices), 2, generator=generator, dtype=torch.float64
    ).requires_grad_()

    def drawn(vertices: Tensor, values: Tensor) -> Tensor:
        return attributes(Triangles(vertices, triangles.faces), values, TILTED, 7)

    assert torch.autograd.gradcheck(drawn, (vertices, values), eps=1e-7, atol=1e-5)


def test_the_gradient_of_a_silhouette_is_there() -> None:
    """Of a mesh of one colour nothing else can have one."""
    ball = sphere(2)
    vertices = ball.vertices.requires_grad_()
    found = rasterize(Triangles(vertices, ball.faces), TILTED, 32, 32)
    flat = (found.face >= 0).to(vertices)[..., None]
    assert not flat.requires_grad
    gradient = slopes(coverage(ball._replace(vertices=vertices), TILTED, 32).sum(), vertices)
    assert (gradient * vertices).sum().item() > 100  # it grows outwards


def test_what_is_not_a_silhouette_stays_as_it_is() -> None:
    """Faces of random colours: only pixels beside the outline are blended, to the last bit."""
    ball = sphere(2)
    found = rasterize(ball, TILTED, 48, 48)
    colours = torch.rand(len(ball.faces) + 1, 3, generator=torch.Generator().manual_seed(0))
    image = colours.double()[found.face]
    changed = (antialias(image, found, ball, TILTED) != image).any(-1)
    empty = (found.face < 0).double()
    beside = torch.nn.functional.max_pool2d(empty[:, None], 3, 1, 1)[:, 0] > 0
    beside &= torch.nn.functional.max_pool2d(1 - empty[:, None], 3, 1, 1)[:, 0] > 0
    assert changed.any()
    assert not (changed & ~beside).any()
    assert float((changed & beside).double().sum() / beside.double().sum()) > 0.3


def split(triangles: Triangles, vertex: int) -> Triangles:
    """The same surface with a vertex twice, at one place, and two faces without an area between the two."""
    faces = triangles.faces.clone()
    after = {}  # of each neighbour, the next one around the vertex
    for face in faces.tolist():
        if vertex in face:
            place = face.index(vertex)
            after[face[place - 2]] = face[place - 1]
    start = end = min(after)
    twin = len(triangles.vertices)
    for _ in range(len(after) // 2):
        for number, face in enumerate(faces.tolist()):
            if {vertex, end, after[end]} == set(face):
                faces[number, face.index(vertex)] = twin
        end = after[end]
    between = torch.tensor([[vertex, start, twin], [twin, end, vertex]])
    vertices = torch.cat([triangles.vertices, triangles.vertices[vertex : vertex + 1]])
    return Triangles(vertices, torch.cat([faces, between]))


def test_faces_without_an_area_are_no_silhouettes() -> None:
    """As marching tetrahedra has them where a vertex of its grid lies right on the surface."""
    ball = sphere(2)
    torn = ball
    for vertex in range(0, len(ball.vertices), 5):
        torn = split(torn, vertex)
    links = adjacent(torn.faces)
    assert bool((links >= 0).all())  # still closed
    colours = torch.rand(len(torn.faces) + 1, 3, generator=torch.Generator().manual_seed(0))
    pictures = []
    for mesh in (ball, torn):
        found = rasterize(mesh, TILTED, 48, 48)
        assert int(found.face.max()) < len(ball.faces)
        pictures.append(antialias(colours.double()[found.face], found, mesh, TILTED))
    torch.testing.assert_close(pictures[1], pictures[0])


def test_a_surface_before_itself_has_a_silhouette() -> None:
    """A small square before a large one, in one mesh: blended between the two, as before a background."""
    near, far = grid(3, 0.4), grid(3, 3.0)
    vertices = torch.cat([near.vertices + torch.tensor([0.3, 0.013, 0.017]), far.vertices])
    both = Triangles(vertices, torch.cat([near.faces, far.faces + len(near.vertices)]))
    alone = Triangles(vertices[: len(near.vertices)], near.faces)
    found = rasterize(both, CAMERA, 32, 32)
    white = ((found.face >= 0) & (found.face < len(near.faces))).double()[..., None]
    image = antialias(white, found, both, CAMERA)
    assert torch.equal(image, coverage(alone, CAMERA, 32))
    assert bool(((image > 0) & (image < 1)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_picture_of_one_colour_stays(dtype: torch.dtype) -> None:
    triangles = random_triangles(20)
    found = rasterize(triangles, TILTED, 24, 24)
    image = torch.full((2, 24, 24, 3), 0.7, dtype=dtype)
    assert torch.equal(antialias(image, found, triangles, TILTED), image)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 12), size=st.integers(1, 12))
def test_a_camera_that_lies_on_its_side_sees_the_same(seed: int, count: int, size: int) -> None:
    """Pairs of pixels above each other are treated as those side by side, and pairs to the left as to the right."""
    triangles = random_triangles(count, seed=seed)
    pose = TILTED.camera_to_world.clone()
    pose[:, :3, 0], pose[:, :3, 1] = pose[:, :3, 1].clone(), -pose[:, :3, 0].clone()
    values = torch.rand(
        3 * count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    upright = attributes(triangles, values, TILTED, size)
    turned = attributes(triangles, values, replace(TILTED, camera_to_world=pose), size)
    torch.testing.assert_close(turned, upright.rot90(-1, (1, 2)), rtol=1e-6, atol=1e-8)


def test_the_sense_of_a_face_does_not_matter() -> None:
    ball = sphere(2)
    turned = ball.faces.clone()
    turned[::3] = turned[::3].flip(1)
    one = coverage(ball, TILTED, 40)
    other = coverage(Triangles(ball.vertices, turned), TILTED, 40)
    torch.testing.assert_close(one, other)


@given(seed=st.integers(0, 10_000), vertices=st.integers(3, 12), count=st.integers(1, 20))
def test_faces_behind_edges(seed: int, vertices: int, count: int) -> None:
    """Against a dictionary; meshes at random have edges of one, two and many faces."""
    generator = torch.Generator().manual_seed(seed)
    faces = torch.stack([torch.randperm(vertices, generator=generator)[:3] for _ in range(count)])
    edges = defaultdict(list)
    for number, face in enumerate(faces.tolist()):
        for corner in range(3):
            edges[frozenset(face) - {face[corner]}].append(3 * number + corner)
    links = adjacent(faces).view(-1)
    for places in edges.values():
        if len(places) == 2:
            assert links[places].tolist() == places[::-1]
        else:
            assert (links[places] == -1).all()


@pytest.mark.parametrize(("end", "second"), [(0.7, 1.0), (0.2, 0.8), (-0.4, 1.0)])
def test_an_edge_cuts_the_pixel_that_it_crosses(end: float, second: float) -> None:
    """Two pixels; the left one's face ends before, between or beyond the centres, where another face hides it."""
    outline = [(end, -9.0), (end, 9.0), (-9.0, 0.0), (90.0, 90.0), (91.0, 90.0), (90.0, 91.0)]
    x, y = torch.tensor(outline, dtype=torch.float64).T[:, None]
    image = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    face, depth = torch.tensor([[[0, 1]]]), torch.tensor([[[1.0, 1.1]]], dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = blend(image, face, depth, Screen(x, y, torch.ones_like(x)), faces).view(-1).tolist()
    first = 0.4 if end < 0 else 0.0
    assert found == pytest.approx([first, second])
