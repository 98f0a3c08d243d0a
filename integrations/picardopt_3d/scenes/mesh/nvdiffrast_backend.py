"""Rasterizing with nvdiffrast (arXiv 2011.03277), which needs CUDA and computes in float32.

It has run on one H200 (nvdiffrast 0.4.0, torch 2.11): on large faces its pictures and gradients are those of plain
torch to rounding. At faces smaller than a pixel it sees fewer silhouettes: the gradient of a ball of 320 faces at 48
pixels differed by 70 % of its norm. Its gradients do not repeat: in a stage of `magic3d` small, a step evaluated again
at the same parameters had another gradient (step 13, relative squared difference 0.04); with plain torch none had.
Its licence forbids commercial use; it is used only where a user has installed it and asks for it.

Its conventions: clip coordinates are OpenGL's, row 0 of a picture lies at y = -w, a row of `rast` is (u, v, z / w, face
plus 1) where u and v are the weights of a face's first and second corner, and face 0 is none. So that row 0 is the
upper one here, y points down in the clip coordinates that it is given.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.screen import NEAR, Screen

_OLDEST = (0, 3, 3)
"""The first version that draws pictures of any size."""

_REMEDY = "pip install --no-build-isolation git+https://github.com/NVlabs/nvdiffrast"


class Rasterized(NamedTuple):
    """What nvdiffrast needs to blend silhouettes.

    Attributes:
        rast: Its picture: weights of the first and second corner, z / w, face plus 1. [views, height, width, 4]
        clip: Clip coordinates of the vertices. [views, vertices, 4]
        faces: Indices of three vertices each, int32. [faces, 3]
    """

    rast: Tensor
    clip: Tensor
    faces: Tensor


def installed() -> bool:
    """Returns whether there is an nvdiffrast, whatever it can do."""
    return importlib.util.find_spec("nvdiffrast") is not None


def why_not(device: torch.device) -> str | None:
    """Returns why nvdiffrast cannot rasterize on a device; None: it can.

    Versions before 0.4 compile their extension in the first call, which takes minutes.

    Args:
        device: The device of the triangles.
    """
    if not installed():
        return f"not installed: {_REMEDY}"
    if device.type != "cuda":
        return f"nvdiffrast needs CUDA, and this is {device.type}"
    version = _version()
    if version is not None and tuple(map(int, re.findall(r"\d+", version)))[:3] < _OLDEST:
        return f"nvdiffrast {version} is too old: it draws no other sizes than multiples of 8; {_REMEDY}"
    return _trouble(_index(device))


def _version() -> str | None:
    """Returns the version of nvdiffrast, None if it was not installed as a package."""
    try:
        return importlib.metadata.version("nvdiffrast")
    except importlib.metadata.PackageNotFoundError:
        return None


def _index(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _trouble(index: int) -> str | None:
    """Returns what is wrong with nvdiffrast on a CUDA device; tried once, because a try may compile for minutes."""
    try:
        _context(index)
    except Exception as error:  # whatever a compiler or a driver says
        does_not = "does not import" if isinstance(error, ImportError) else "does not start"
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return f"nvdiffrast {does_not}: {said}"
    return None


@cache
def _context(index: int) -> Any:
    """Returns nvdiffrast's context on a CUDA device, which holds its buffers."""
    import nvdiffrast.torch

    return nvdiffrast.torch.RasterizeCudaContext(device=f"cuda:{index}")


def clip_coordinates(screen: Screen, height: int, width: int) -> Tensor:
    """Returns vertices in nvdiffrast's clip coordinates, float32: `[views, vertices, 4]`.

    z / w is -1 at `NEAR` and approaches 1 at infinity.

    Args:
        screen: The vertices on the screens.
        height: Rows of pixels.
        width: Columns of pixels.
    """
    x, y, depth = screen
    clip = torch.stack([x / (0.5 * width), y / (0.5 * height), depth - 2 * NEAR, depth], dim=-1)
    return clip.float().contiguous()


def rasterize_nvdiffrast(
    screen: Screen, faces: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Rasterized]:
    """Finds the nearest faces with nvdiffrast.

    Args:
        screen: The vertices on the screens, on CUDA; at least one view.
        faces: Indices of three vertices each, int64, at least one, `[faces, 3]`.
        height: Rows of pixels.
        width: Columns of pixels.

    Returns:
        The nearest face at each pixel's centre, -1: none, `[views, height, width]`; the weights of its corners,
        `[views, height, width, 3]`; what `antialias_nvdiffrast` needs.
    """
    import nvdiffrast.torch

    clip = clip_coordinates(screen, height, width)
    corners = faces.int().contiguous()
    context = _context(_index(clip.device))
    rast, _ = nvdiffrast.torch.rasterize(context, clip, corners, (height, width), grad_db=False)
    face, shares = read(rast)
    return face, shares.to(screen.depth.dtype), Rasterized(rast, clip, corners)


def read(rast: Tensor) -> tuple[Tensor, Tensor]:
    """Returns faces and weights of their corners from nvdiffrast's picture.

    Args:
        rast: The picture, `[views, height, width, 4]`.

    Returns:
        Faces, -1: none, `[views, height, width]`, and weights, 0 where there is none, `[views, height, width, 3]`.
    """
    first, second, number = rast[..., 0], rast[..., 1], rast[..., 3].detach()
    # Beyond 2^24 a float holds no whole numbers: the bits are the number, above those of the float 2^22.
    large = number.contiguous().view(torch.int32).long() - 0x4A800000
    face = torch.where(number <= 2**24, number.long(), large) - 1
    shares = torch.stack([first, second, 1 - first - second], dim=-1)
    return face, torch.where(face[..., None] >= 0, shares, 0.0)


def antialias_nvdiffrast(image: Tensor, drawn: Rasterized) -> Tensor:
    """Blends pixels across silhouettes with nvdiffrast: `[views, height, width, channels]`.

    Args:
        image: The picture, `[views, height, width, channels]`.
        drawn: What `rasterize_nvdiffrast` returned.
    """
    import nvdiffrast.torch

    colours = image.float().contiguous()
    blended: Tensor = nvdiffrast.torch.antialias(colours, drawn.rast, drawn.clip, drawn.faces)
    return blended.to(image.dtype)
