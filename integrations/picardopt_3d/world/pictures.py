"""Example pictures of the built-in world, and the command that writes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.images import ReferenceImage, save_reference
from picardopt_3d.world.subjects import Subject
from picardopt_3d.world.views import render

EXAMPLES: dict[str, tuple[Subject, float, float]] = {
    "red_chair": (Subject("chair", "red"), 20.0, 30.0),
    "blue_mug": (Subject("mug", "blue"), 30.0, -50.0),
    "green_snowman": (Subject("snowman", "green"), 15.0, 40.0),
}
"""Three pictures, as in the paper's Figure 6: what they show, elevation and azimuth in degrees."""


def true_reference(subject: Subject, camera: Cameras, size: int = 512) -> ReferenceImage:
    """Returns the picture of a subject, as if it had been loaded.

    Args:
        subject: What it shows.
        camera: Where from, a batch of one.
        size: Pixels along a side.
    """
    rgb, alpha = render(subject, camera, size, size)
    return ReferenceImage(rgb[0], alpha[0], camera)


def write_examples(folder: Path, size: int = 256) -> list[Path]:
    """Writes the example pictures, as RGBA.

    Args:
        folder: Where.
        size: Pixels along a side.

    Returns:
        The files.
    """
    paths = []
    for name, (subject, elevation, azimuth) in EXAMPLES.items():
        picture = true_reference(subject, orbit_cameras(elevation, azimuth), size)
        paths.append(folder / f"{name}.png")
        save_reference(picture, paths[-1])
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m picardopt_3d.images FOLDER`: writes the example pictures, and says how to use them."""
    parser = argparse.ArgumentParser(
        prog="python -m picardopt_3d.images", description="Write the example pictures."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256, help="pixels along a side")
    given = parser.parse_args(argv)
    for path in write_examples(given.folder, given.size):
        subject, elevation, azimuth = EXAMPLES[path.stem]
        print(
            f"picardopt image-to-3d {path} --framed --elevation {elevation:g} --azimuth {azimuth:g} "
            f'--subject "{subject.caption}" --out runs/{path.stem}'
        )
