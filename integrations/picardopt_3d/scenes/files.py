"""Builds, saves and loads scenes: a file is safetensors with the configuration as JSON in its header."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from picardopt_3d.scenes.gaussians import Gaussians, GaussiansConfig, StrategyConfig
from picardopt_3d.scenes.hash_grid import HashConfig
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig
from picardopt_3d.scenes.mesh.tetrahedral import Tetrahedral
from picardopt_3d.scenes.mesh.textured import TexturedMesh
from picardopt_3d.scenes.nerf import NerfConfig, NerfField
from picardopt_3d.scenes.occupancy import OccupancyConfig
from picardopt_3d.scenes.radiance_field import FieldConfig, RadianceField
from picardopt_3d.scenes.scene import Scene
from picardopt_3d.scenes.sdf import SdfConfig, SdfField

SceneConfig = (
    FieldConfig | NerfConfig | SdfConfig | GaussiansConfig | TetrahedralConfig | TexturedMeshConfig
)

KINDS: dict[str, tuple[type[SceneConfig], type[Scene]]] = {
    "voxels": (FieldConfig, RadianceField),
    "nerf": (NerfConfig, NerfField),
    "sdf": (SdfConfig, SdfField),
    "gaussians": (GaussiansConfig, Gaussians),
    "tetrahedra": (TetrahedralConfig, Tetrahedral),
    "textured": (TexturedMeshConfig, TexturedMesh),
}
"""Configuration class and scene class by the kind that a file's header names."""

_PARTS = {"encoding": HashConfig, "occupancy": OccupancyConfig, "strategy": StrategyConfig}
"""Classes of nested configurations."""


def build_scene(config: SceneConfig, other: Scene | None = None) -> Scene:
    """Builds the scene that a configuration describes.

    Args:
        config: The scene's configuration.
        other: A scene to start from, such as that of a recipe's previous stage; None: start fresh.

    Raises:
        TypeError: The configuration belongs to no scene, or the other scene cannot be converted to this kind.
    """
    kind: Any = KINDS[_kind_of(config)][1]
    scene: Scene = kind(config) if other is None else kind.from_scene(config, other)
    return scene


def check_conversion(config: SceneConfig, other: SceneConfig) -> None:
    """Checks that the scene of one configuration can start from that of another one, before there are scenes.

    Args:
        config: Of the scene that starts from the other one.
        other: Of the other one.

    Raises:
        TypeError: A configuration belongs to no scene, or there is no conversion between the two kinds.
        ValueError: There is no conversion between the two configurations.
    """
    kind, given = (KINDS[_kind_of(each)][1] for each in (config, other))
    kind.check_conversion(config, given, other)


def save_scene(scene: Scene, path: Path) -> None:
    """Writes a scene's tensors to a file, with its kind and configuration in the header."""
    config: Any = scene.config
    header = {"kind": _kind_of(config), "config": asdict(config)}
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in scene.state_dict().items()
    }
    save_file(tensors, path, metadata={"scene": json.dumps(header)})


def load_scene(path: Path) -> Scene:
    """Reads a scene that `save_scene` wrote, to the CPU.

    Raises:
        ValueError: The file does not hold a scene, or another version of the package wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("scene")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"path={path}: not safetensors ({error}); give the scene file of a run"
        ) from error
    if header is None:
        raise ValueError(f"path={path}: its header names no scene; give a scene of this package")
    scene = build_scene(_read_config(path, json.loads(header)))
    scene.load_state_dict(tensors)
    return scene


def _kind_of(config: Any) -> str:
    for kind, (config_class, _) in KINDS.items():
        if type(config) is config_class:
            return kind
    known = ", ".join(config_class.__name__ for config_class, _ in KINDS.values())
    raise TypeError(f"config={type(config).__name__}: give one of {known}")


def _read_config(path: Path, header: dict[str, Any]) -> SceneConfig:
    """Returns the configuration in a file's header."""
    kind, values = header.get("kind"), dict(header.get("config", {}))
    if kind not in KINDS:
        raise ValueError(
            f"path={path}: a scene of kind {kind!r}; this version reads {', '.join(KINDS)}"
        )
    config_class = KINDS[kind][0]
    unknown = sorted(set(values) - {field.name for field in fields(config_class)})
    if unknown:
        raise ValueError(
            f"path={path}: {config_class.__name__} has no {', '.join(unknown)}; read it with the version that wrote it"
        )
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = _PARTS[name](**value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return config_class(**values)
