"""Fewer pieces and fewer triangles of a mesh."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from picardopt_3d.scenes.mesh.triangles import Triangles

_AGGRESSIVENESS = (
    3.0  # at its default, 7, the library meets the count but loses parts such as a mug's handle
)


def cleaned(
    corners: npt.NDArray[np.floating],
    faces: npt.NDArray[np.integer],
    components: int | None,
    most: int | None,
    radius: float,
) -> Triangles:
    """Returns the largest pieces of a mesh, simplified to a number of triangles."""
    if components is not None:
        corners, faces = largest_components(corners, faces, components)
    if most is not None and most < len(faces):
        corners, faces = simplified(corners, faces, most, radius)
    return Triangles(
        torch.from_numpy(corners.astype(np.float32)), torch.from_numpy(faces.astype(np.int64))
    )


def largest_components(
    vertices: npt.NDArray[np.floating], faces: npt.NDArray[np.integer], count: int
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Returns the connected pieces of largest area.

    Args:
        vertices: Positions of the vertices, `[vertices, 3]`.
        faces: Indices of the triangles' vertices, `[faces, 3]`.
        count: Number of pieces to keep.

    Returns:
        Vertices and faces of the pieces, in their old order.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    starts, ends = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    graph = coo_matrix((np.ones(len(starts), bool), (starts, ends)), shape=(len(vertices),) * 2)
    pieces, piece = connected_components(graph, directed=False)
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    areas = np.bincount(
        piece[faces[:, 0]], np.linalg.norm(np.cross(b - a, c - a), axis=1), minlength=pieces
    )
    kept = np.isin(piece, np.argsort(-areas, kind="stable")[:count])
    numbers = np.cumsum(kept) - 1
    return vertices[kept], numbers[faces[kept[faces[:, 0]]]]


def simplified(
    vertices: npt.NDArray[np.floating],
    faces: npt.NDArray[np.integer],
    count: int,
    radius: float = 1.0,
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Simplifies a mesh to about `count` triangles by quadric edge collapse (Garland and Heckbert, 1997).

    Args:
        vertices: Positions, `[vertices, 3]`.
        faces: Indices of the triangles' vertices, `[faces, 3]`.
        count: Number of triangles to aim for.
        radius: Radius of the scene; the library's thresholds are for a radius of about 1.
    """
    import fast_simplification

    found: tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]] = fast_simplification.simplify(
        np.ascontiguousarray(vertices / radius, np.float32),
        np.ascontiguousarray(faces, np.int32),
        target_count=count,
        agg=_AGGRESSIVENESS,
    )
    return found[0] * radius, found[1]
