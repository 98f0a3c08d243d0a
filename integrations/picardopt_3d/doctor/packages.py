"""Which packages are installed, and whether they fit."""

from __future__ import annotations

import importlib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from picardopt_3d.doctor.finding import Finding, first_line

_PURPOSES = {
    "torch": "everything",
    "diffusers": "diffusion models",
    "transformers": "text and image encoders, CLIP",
    "tokenizers": "their tokenizers",
    "huggingface-hub": "downloads of models",
    "safetensors": "files of weights and scenes",
    "peft": "LoRA of variational score distillation",
    "accelerate": "CPU offload of large models; peft needs it",
    "tyro": "command lines",
    "typing-extensions": "types of newer Python versions",
    "tqdm": "progress bars",
    "pillow": "pictures",
    "matplotlib": "plots",
    "imageio": "films",
    "imageio-ffmpeg": "films",
    "numpy": "arrays",
    "scipy": "connected pieces of meshes, distances from them",
    "scikit-image": "surfaces of meshes, SSIM",
    "fast-simplification": "meshes with fewer triangles",
    "trimesh": "files of meshes with a texture",
    "xatlas": "unwraps meshes",
    "dacite": "configurations",
    "pyyaml": "configurations in files",
    "jinja2": "pages for a browser",
    "tensorboard": "curves, with --tensorboard",
    "packaging": "this report",
}
_OPTIONAL = {
    "gsplat": "rasterizes 3D Gaussians on a GPU",
    "nvdiffrast": "rasterizes triangles on a GPU",
    "nerfacc": "samples occupied space on a GPU",
    "rembg": "cuts objects out of pictures",
    "wandb": "curves, with --wandb",
    "viser": "shows runs in the browser",
}


def required_packages() -> list[Finding]:
    """Returns both distributions' requirements, torch first, and whether torchvision stands in the way."""
    found = {}
    for distribution in ("picardopt", "picardopt-3d"):
        for text in metadata.requires(distribution) or [] if installed(distribution) else []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if "extra" not in str(requirement.marker) and name != "picardopt":
                found[name] = _package(requirement)
    order = {name: place for place, name in enumerate(_PURPOSES)}
    packages = [found[name] for name in sorted(found, key=lambda n: order.get(n, len(order)))]
    if not packages:
        remedy = "not installed: pip install picardopt-3d (or `make env` in a clone)"
        return [Finding("broken", "picardopt-3d", remedy)]
    return [*packages, *_torchvision()]


def optional_packages() -> list[Finding]:
    """Returns what is used if it is installed."""
    return [
        Finding("ok" if version else "absent", name, f"{version or '-'}: {purpose}")
        for name, purpose in _OPTIONAL.items()
        for version in [installed(name)]
    ]


def _package(requirement: Requirement) -> Finding:
    """Whether a requirement is installed in a version that fits."""
    name = canonicalize_name(requirement.name)
    version, purpose = installed(name), _PURPOSES.get(name, "needed by picardopt")
    if not version:
        remedy = f'missing ({purpose}): pip install "{name}{requirement.specifier}"'
        return Finding("broken", name, remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        remedy = f'{version} does not fit ({purpose}): pip install "{name}{requirement.specifier}"'
        return Finding("broken", name, remedy)
    return Finding("ok", name, f"{version}: {purpose}")


def _torchvision() -> list[Finding]:
    """A torchvision built for another torch: transformers, diffusers and peft then fail to import."""
    version = installed("torchvision")
    if not version:
        return []
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        remedy = (
            f"{version} does not import ({first_line(error)}), and then diffusers and transformers do not: "
            "pip uninstall torchvision, or install the one made for this torch"
        )
        return [Finding("broken", "torchvision", remedy)]
    return [Finding("ok", "torchvision", f"{version}: not needed here")]


def installed(name: str) -> str:
    """Returns the version of a distribution, "" if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
