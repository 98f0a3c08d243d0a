"""Prints the tables of a shipped model's card.

    python -m picardopt_3d.training.evaluate [--folder FOLDER]

The folder's index names its kind: a text-to-view model in pixels or in latents, a Zero-1-to-3 model, or a CLIP model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from picardopt_3d.models import MODELS, kind_of, named
from picardopt_3d.training.tables import EvaluationConfig


def evaluation_of(folder: Path) -> Callable[[EvaluationConfig], None]:
    """Returns the function that evaluates the model in a folder, as the folder's index names it.

    Raises:
        ValueError: The folder holds no known kind of model.
    """
    for name, entry in (("model_index.json", "_class_name"), ("config.json", "architectures")):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text()).get(entry)
            kind = kind_of(found[0] if isinstance(found, list) else found)
            if kind is not None and kind.evaluation is not None:
                evaluation: Callable[[EvaluationConfig], None] = named(kind.evaluation)
                return evaluation
    known = [name for kind in MODELS.values() if kind.evaluation for name in kind.classes]
    raise ValueError(
        f"folder={str(folder)!r} holds none of {', '.join(known)}: give a model that a training wrote"
    )


def main(config: EvaluationConfig) -> None:
    """Prints the tables of the model in the folder."""
    with torch.no_grad():
        evaluation_of(config.folder)(config)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, description=__doc__))
