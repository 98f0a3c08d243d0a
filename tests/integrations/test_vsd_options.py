"""Variational score distillation from options: the LoRA's model, and networks that are shared."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.guidance.choose import GuidanceConfig, load_guidance
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.vsd import VSD, VsdConfig

from tests.integrations.helpers.distillation import check_against_the_source, stir
from tests.integrations.helpers.tiny_pipelines import save_both_predictions

IN_MEMORY = ModelOptions(embeddings=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_both_predictions(tmp_path_factory.mktemp("models"))


def test_options_that_vsd_cannot_keep_are_refused() -> None:
    for model in ("exact", "zero123"):
        with pytest.raises(ValueError, match=f"loss='vsd' with model='{model}'"):
            GuidanceConfig(model, loss="vsd")
    with pytest.raises(ValueError, match="loss='nds': give one of sds, vsd"):
        GuidanceConfig(loss="nds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_source='a/b' with loss='sds': only VSD has a LoRA"):
        GuidanceConfig(lora_source="a/b")


def two_networks(folders: dict[str, Path], **options: Any) -> VSD:
    """The pretrained score of one model, the LoRA on another one, as ProlificDreamer has them."""
    config = GuidanceConfig(
        "stable-diffusion",
        str(folders["epsilon"]),
        ModelOptions(embeddings=None, **options),
        loss="vsd",
        lora_source=str(folders["v_prediction"]),
    )
    vsd = load_guidance(config, "a mug", 16, "cpu", vsd=VsdConfig(drop_camera=0.0))
    assert isinstance(vsd, VSD)
    return vsd


def test_the_lora_of_another_model_by_options(folders: dict[str, Path]) -> None:
    vsd = two_networks(folders)
    assert vsd.score.prediction_type == "epsilon"
    assert vsd.lora_score.prediction_type == "v_prediction"
    assert vsd.lora_score.vae is vsd.score.vae  # type: ignore[attr-defined]  # in memory once
    check_against_the_source(stir(vsd), folders["epsilon"], folders["v_prediction"])


def test_a_network_that_the_lora_leaves_alone_is_shared(folders: dict[str, Path]) -> None:
    vsd, again = two_networks(folders), two_networks(folders)
    config = replace(GuidanceConfig("stable-diffusion", str(folders["epsilon"]), IN_MEMORY))
    assert vsd.score is again.score is load_guidance(config, "a mug", 16, "cpu").score
    assert vsd.lora_score is not again.lora_score
    one = replace(config, loss="vsd", lora_source=config.source)
    alone = load_guidance(one, "a mug", 16, "cpu")
    assert isinstance(alone, VSD)
    assert alone.score is alone.lora_score is not vsd.score


def test_the_lora_is_trained_beside_a_network_that_is_offloaded(folders: dict[str, Path]) -> None:
    vsd = two_networks(folders, offload="model")
    assert vsd.lora_score.options.offload == "none"
    assert vsd.score.options.offload == "model"
    vsd(torch.rand(1, 3, 16, 16), vsd.encode("a mug"), turntable_cameras(1)).backward()
    assert all(parameter.grad is not None for parameter in vsd.lora_parameters)


def test_stages_share_a_network_as_long_as_one_uses_it(folders: dict[str, Path]) -> None:
    def loaded(**changed: Any) -> Any:
        config = GuidanceConfig("stable-diffusion", str(folders["epsilon"]), IN_MEMORY, **changed)
        return load_guidance(config, "a mug", 16, "cpu")

    first, second = loaded(), loaded(negative="blurred")
    assert first.score is second.score
    other = GuidanceConfig("stable-diffusion", str(folders["v_prediction"]), IN_MEMORY)
    assert load_guidance(other, "a mug", 16, "cpu").score is not first.score
    vsd = loaded(loss="vsd")  # it changes its network
    assert vsd.score is not first.score
    assert loaded().score is first.score
    gone = weakref.ref(first.score)
    del first, second
    gc.collect()
    assert gone() is None
