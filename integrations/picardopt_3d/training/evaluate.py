"""How good a shipped model is, in figures: the tables of its model card.

    python -m picardopt_3d.training.evaluate [--folder FOLDER]

The folder says what it is: a text-to-view model in pixels or in latents, a Zero-1-to-3 twin, or a CLIP model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from picardopt_3d.training.evaluate_clip import print_clip_table
from picardopt_3d.training.evaluate_latent import print_latent_tables, print_zero123_tables
from picardopt_3d.training.evaluate_pixels import print_pixel_tables
from picardopt_3d.training.tables import EvaluationConfig

EVALUATIONS: dict[str, Callable[[EvaluationConfig], None]] = {
    "TextToViewPipeline": print_pixel_tables,
    "StableDiffusionPipeline": print_latent_tables,
    "Zero123Pipeline": print_zero123_tables,
    "CLIPModel": print_clip_table,
}


def kind_of(folder: Path) -> str:
    """Returns the class that a folder's own index names.

    Raises:
        ValueError: The folder holds no model that is known here.
    """
    for name, entry in (("model_index.json", "_class_name"), ("config.json", "architectures")):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text()).get(entry)
            kind = found[0] if isinstance(found, list) else found
            if kind in EVALUATIONS:
                return str(kind)
    raise ValueError(
        f"folder={str(folder)!r} holds none of {', '.join(EVALUATIONS)}: give a model that a training wrote"
    )


def main(config: EvaluationConfig) -> None:
    """Prints the tables of the model that the folder holds."""
    with torch.no_grad():
        EVALUATIONS[kind_of(config.folder)](config)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, description=__doc__))
