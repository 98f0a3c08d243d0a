"""Writes 3D Gaussians to files that other viewers open: PLY as 3D Gaussian Splatting has it, .splat, and glTF.

The world has z up and its front along +x. PLY and .splat have no convention: they keep the world's axes unless `up`
says otherwise. Most viewers expect y down, as captured scenes have it, and turn it up: "minus-y". glTF has y up. With
y up or down the front is along +z.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.transform import Rotation

from picardopt_3d.export.glb import Part, pack_glb, to_linear
from picardopt_3d.io import replacing
from picardopt_3d.scenes.gaussians.harmonics import harmonic_basis
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats, check_finite

Format = Literal["ply", "splat", "splats-glb"]
Up = Literal["z", "y", "minus-y"]

_TURNS = {  # the world's axes turned into the file's, as quaternions w, x, y, z
    "z": (1.0, 0.0, 0.0, 0.0),
    "y": (0.5, -0.5, -0.5, -0.5),  # x, y, z -> y, z, x
    "minus-y": (0.5, 0.5, -0.5, 0.5),  # x, y, z -> -y, -z, x
}
_HARMONICS = 15  # coefficients a channel above the constant one in a PLY file: those of degree 3
_LARGEST_LOG_SCALE = 88.0  # the exponential of more overflows in single precision


class SplatTable(NamedTuple):
    """Gaussians in the axes of a file, in double precision."""

    means: npt.NDArray[np.float64]  # [count, 3]
    log_scales: npt.NDArray[np.float64]  # [count, 3]
    rotations: npt.NDArray[np.float64]  # unit, w, x, y, z [count, 4]
    logits: npt.NDArray[np.float64]  # [count]
    colours: npt.NDArray[np.float64]  # [count, 3]
    harmonics: npt.NDArray[np.float64]  # [count, 0, 3, 8 or 15, 3]

    @property
    def scales(self) -> npt.NDArray[np.float64]:
        """Standard deviations that single precision can hold."""
        return np.exp(np.minimum(self.log_scales, _LARGEST_LOG_SCALE))

    @property
    def opacities(self) -> npt.NDArray[np.float64]:
        """Opacities in [0, 1]."""
        return np.asarray(torch.from_numpy(self.logits).sigmoid().numpy())

    @property
    def shown(self) -> npt.NDArray[np.float64]:
        """Colours without the higher harmonics, RGB in [0, 1] (sRGB)."""
        return np.clip(0.5 + SH_C0 * self.colours, 0.0, 1.0)

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """Indices of the Gaussians, those with most opacity times volume first."""
        weight = self.log_scales.sum(axis=1) + np.log(np.maximum(self.opacities, 1e-300))
        return np.argsort(-weight, kind="stable")


def save_splats(splats: Splats, path: Path, format: Format, up: Up | None = None) -> None:
    """Writes Gaussians to a file, atomically.

    Args:
        splats: The Gaussians.
        path: The file to write.
        format: "ply": the layout of 3D Gaussian Splatting (62 floats a Gaussian; normals, which it never used, and
            missing harmonics are zeros). "splat": 32 bytes a Gaussian, the opaque and large ones first; colours
            (without the higher harmonics), opacities and rotations in eight bits. "splats-glb": binary glTF with
            `KHR_gaussian_splatting`, where viewers without it show points.
        up: The axis that points up in the file: "z" as in the world, or "y" or "minus-y" with the front along +z. By
            default "y" for glTF, which allows no other, and "z" for the rest.

    Raises:
        ValueError: There are no Gaussians, their values are not finite, the format is unknown, or it does not allow
            `up`.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format!r}: give one of {', '.join(get_args(Format))}")
    if format == "splats-glb" and up not in (None, "y"):
        raise ValueError(f"up={up!r} with format='splats-glb': glTF has y up; leave it out")
    table = splat_table(splats, up or ("y" if format == "splats-glb" else "z"))
    write = {"ply": _ply, "splat": _splat, "splats-glb": _glb}[format]
    content = write(table)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def splat_table(splats: Splats, up: Up = "z") -> SplatTable:
    """Returns Gaussians in a file's axes, with rotations of length 1.

    Raises:
        ValueError: There are no Gaussians, or their values are not finite.
    """
    check_finite(splats)
    if len(splats.means) == 0:
        raise ValueError("there are no Gaussians to write")
    tensors = [tensor.detach().double().cpu().numpy() for tensor in splats]
    means, log_scales, rotations, logits, colours, harmonics = tensors
    largest = np.abs(rotations).max(axis=1, keepdims=True, initial=0.0)
    rotations = np.where(largest > 0, rotations, (1.0, 0.0, 0.0, 0.0))  # zero turns nothing
    rotations = rotations / np.where(largest > 0, largest, 1.0)  # or squares would overflow
    rotations /= np.linalg.norm(rotations, axis=1, keepdims=True)
    if up != "z":
        turn = Rotation.from_quat(_TURNS[up], scalar_first=True)
        means = means @ turn.as_matrix().T
        rotations = (turn * Rotation.from_quat(rotations, scalar_first=True)).as_quat(
            scalar_first=True
        )
        harmonics = _turned_harmonics(harmonics, turn)
    return SplatTable(means, log_scales, rotations, logits, colours, harmonics)


def _turned_harmonics(
    harmonics: npt.NDArray[np.float64], turn: Rotation
) -> npt.NDArray[np.float64]:
    """Returns harmonics that have in turned directions the colours that the given ones have in the old ones.

    Args:
        harmonics: Coefficients above the constant one. [count, 0, 3, 8 or 15, 3]
        turn: From the old axes to the new.
    """
    degree = round((harmonics.shape[1] + 1) ** 0.5) - 1
    if degree == 0:
        return harmonics
    directions = np.random.default_rng(0).normal(size=(64, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    old, new = (
        harmonic_basis(torch.from_numpy(seen), degree).numpy()
        for seen in (directions, turn.apply(directions))
    )
    # Turned harmonics are sums of harmonics of the same degree, so that a few directions determine them exactly.
    turned: npt.NDArray[np.float64] = np.linalg.lstsq(new, old)[0] @ harmonics
    return turned


def _ply(table: SplatTable) -> bytes:
    """Returns a PLY file in the layout of 3D Gaussian Splatting, which strict readers want to the byte."""
    count = len(table.means)
    harmonics = np.zeros((count, 3, _HARMONICS))  # channel by channel
    harmonics[:, :, : table.harmonics.shape[1]] = table.harmonics.swapaxes(1, 2)
    normals, logits = np.zeros_like(table.means), table.logits[:, None]
    columns = [table.means, normals, table.colours, harmonics.reshape(count, -1), logits]
    rows = np.hstack([*columns, table.log_scales, table.rotations])
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    names += [*(f"f_rest_{i}" for i in range(3 * _HARMONICS)), "opacity"]
    names += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [*(f"property float {name}" for name in names), "end_header\n"]
    return "\n".join(header).encode() + rows.astype("<f4").tobytes()


def _splat(table: SplatTable) -> bytes:
    """Returns a .splat file: position, scale, colour with opacity, and rotation, without a header."""
    order = table.order
    rows = np.empty(
        len(order), [("places", "<f4", 6), ("colours", "u1", 4), ("rotations", "u1", 4)]
    )
    rows["places"] = np.hstack([table.means, table.scales])[order]
    rgba = np.hstack([table.shown, table.opacities[:, None]])
    rows["colours"] = np.rint(255 * rgba)[order]
    rows["rotations"] = np.clip(np.rint(128 * table.rotations + 128), 0, 255)[order]
    return rows.tobytes()


def _glb(table: SplatTable) -> bytes:
    """Returns a binary glTF file with `KHR_gaussian_splatting`, an extension ratified by Khronos."""
    own = "KHR_gaussian_splatting:"
    linear = np.hstack([to_linear(table.shown), table.opacities[:, None]])
    columns: dict[str, npt.NDArray[Any]] = {
        "POSITION": table.means,
        "COLOR_0": linear,  # for viewers that show points
        own + "ROTATION": np.roll(table.rotations, -1, axis=1),  # x, y, z, w
        own + "SCALE": table.scales,
        own + "OPACITY": table.opacities,
        own + "SH_DEGREE_0_COEF_0": table.colours,
    }
    for index in range(table.harmonics.shape[1]):
        degree = int((index + 1) ** 0.5)
        name = f"SH_DEGREE_{degree}_COEF_{index + 1 - degree**2}"
        columns[own + name] = table.harmonics[:, index]
    parts = [
        Part(column.astype("<f4"), bounds=name == "POSITION") for name, column in columns.items()
    ]
    extension = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    primitive = {
        "attributes": {name: index for index, name in enumerate(columns)},
        "mode": 0,  # points
        "extensions": {"KHR_gaussian_splatting": extension},
    }
    return pack_glb(
        parts,
        {"meshes": [{"primitives": [primitive]}], "extensionsUsed": ["KHR_gaussian_splatting"]},
    )
