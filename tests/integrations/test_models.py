"""The registry of models: one entry a kind, and all of it true."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from picardopt_3d.guidance import deepfloyd, stable_diffusion
from picardopt_3d.guidance.choose import GuidanceConfig, Model
from picardopt_3d.models import GUIDANCE_MODELS, MODELS, WEIGHTS, kind_of, named


def test_options_name_the_kinds_of_score_models() -> None:
    assert set(get_args(Model)) == GUIDANCE_MODELS.keys() | {"exact"}
    for name, kind in GUIDANCE_MODELS.items():
        if kind.shipped is None:
            with pytest.raises(ValueError, match="without a source"):
                GuidanceConfig(name)  # type: ignore[arg-type]
        else:
            assert GuidanceConfig(name).source is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODELS.values(), ids=list(MODELS))
def test_what_an_entry_names_is_there(kind) -> None:
    assert callable(named(kind.loader).from_pretrained)
    assert kind.loader_name == named(kind.loader).__name__
    if kind.evaluation is not None:
        assert callable(named(kind.evaluation))
    if kind.shipped is not None:
        index = kind.shipped / "model_index.json"
        index = index if index.exists() else kind.shipped / "config.json"
        content = json.loads(index.read_text())
        found = content.get("_class_name") or content["architectures"]
        assert (found[-1] if isinstance(found, list) else found) in kind.classes


def test_every_shipped_model_has_a_kind() -> None:
    for folder in WEIGHTS.iterdir():
        index = folder / "model_index.json"
        index = index if index.exists() else folder / "config.json"
        content = json.loads(index.read_text())
        found = content.get("_class_name") or content["architectures"]
        assert kind_of(found[-1] if isinstance(found, list) else found) is not None, folder.name
    assert kind_of("FluxPipeline") is None


def test_loaders_take_the_classes_of_their_kind() -> None:
    assert GUIDANCE_MODELS["stable-diffusion"].classes == stable_diffusion._CLASSES
    assert GUIDANCE_MODELS["deepfloyd"].classes == deepfloyd._CLASSES
