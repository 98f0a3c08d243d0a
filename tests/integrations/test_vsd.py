"""Variational score distillation: the paper's gradients, and a LoRA that learns beside a network that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.sds import ScoreDistillation
from picardopt_3d.guidance.vsd import VSD, VsdConfig

from picardopt import step_rng
from tests.integrations.helpers.distillation import check_against_the_source, load, stir
from tests.integrations.helpers.tiny_pipelines import save_both_predictions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_both_predictions(tmp_path_factory.mktemp("models"))


# -- against the source -----------------------------------------------------------------------------------


def test_the_gradients_are_those_of_the_paper_on_one_network(folders: dict[str, Path]) -> None:
    vsd = stir(VSD(load(folders["epsilon"]), VsdConfig(drop_camera=0.0)))
    check_against_the_source(vsd, folders["epsilon"], folders["epsilon"])


def test_the_gradients_are_those_of_the_paper_on_two_networks(folders: dict[str, Path]) -> None:
    config = VsdConfig(
        guidance_scale=3.0, lora_guidance_scale=2.0, drop_camera=1.0, weighting="uniform"
    )
    vsd = stir(VSD(load(folders["epsilon"]), config, load(folders["v_prediction"])))
    check_against_the_source(vsd, folders["epsilon"], folders["v_prediction"])


def test_the_pretrained_network_stays_what_it_was(folders: dict[str, Path]) -> None:
    score, fresh = load(folders["epsilon"]), load(folders["epsilon"])
    vsd = VSD(score)
    prompt, cameras = vsd.encode("a red mug"), turntable_cameras(2)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([20, 700])
    expected = fresh.predict_noise(noisy, t, fresh.encode("a red mug"), cameras)
    for _ in range(3):
        vsd(torch.rand(2, 3, 16, 16, requires_grad=True), prompt, cameras).backward()
        vsd.optimizer.step()
        vsd.optimizer.zero_grad()
    with vsd._pretrained():
        found = score.predict_noise(noisy, t, prompt, cameras)
    assert torch.equal(found.conditional, expected.conditional)
    assert torch.equal(found.unconditional, expected.unconditional)
    now = vsd._present(noisy, t, prompt, cameras)
    assert (now - expected.conditional).abs().max() > 1e-3


def test_a_model_that_knows_cameras_keeps_its_own_embedding() -> None:
    score = PixelDiffusion.from_pretrained()
    embedding = score.unet.class_embedding
    before = [p.clone() for p in embedding.parameters()]
    vsd = VSD(score, VsdConfig(learning_rate=0.1))
    views = torch.rand(1, 3, 32, 32, requires_grad=True)
    vsd(views, vsd.encode("a red cube"), turntable_cameras(1)).backward()
    vsd.optimizer.step()
    assert score.unet.class_embedding is embedding
    assert all(torch.equal(a, b) for a, b in zip(before, embedding.parameters(), strict=True))
    assert views.grad.abs().sum() > 0


def test_the_lora_learns(folders: dict[str, Path]) -> None:
    """On one draw of a scene that stands still, its loss falls."""
    vsd = VSD(load(folders["epsilon"]), VsdConfig(learning_rate=0.02))
    prompt, cameras = vsd.encode("a red mug"), turntable_cameras(2)
    views, losses = torch.rand(2, 3, 16, 16), []
    for _ in range(25):
        with step_rng(0, 0):
            vsd.optimizer.zero_grad()
            clean = vsd.score.to_model_space(views)
            noise, t, told = torch.randn(clean.shape), torch.tensor([300, 600]), torch.ones(2)
            loss = vsd._lora_loss(clean, t, noise, prompt, cameras, told)
        loss.backward()
        vsd.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_half_precision_the_lora_is_float32(folders: dict[str, Path], dtype: str) -> None:
    vsd = stir(VSD(load(folders["epsilon"], dtype=dtype)))
    assert vsd.score.unet.conv_in.weight.dtype is getattr(torch, dtype)
    assert {p.dtype for p in vsd.lora_parameters} == {torch.float32}
    views = torch.rand(1, 3, 16, 16, requires_grad=True)
    vsd(views, vsd.encode("a red mug"), turntable_cameras(1)).backward()
    assert all(p.grad.dtype is torch.float32 for p in vsd.lora_parameters)
    assert all(torch.isfinite(p.grad).all() for p in [views, *vsd.lora_parameters])


def test_the_state_of_another_lora_is_refused(folders: dict[str, Path]) -> None:
    vsd = VSD(load(folders["epsilon"]), VsdConfig(rank=2))
    other = VSD(load(folders["epsilon"]), VsdConfig(rank=3))
    with pytest.raises(RuntimeError, match="other layers or another rank"):
        vsd.load_state_dict(other.state_dict())
    with pytest.raises(KeyError, match="without variational score distillation"):
        vsd.load_state_dict({})
    plain = ScoreDistillation(load(folders["epsilon"]))
    with pytest.raises(RuntimeError, match="learns nothing, but the state holds lora"):
        plain.load_state_dict(vsd.state_dict())


# -- misuse -----------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_said(folders: dict[str, Path]) -> None:
    score = load(folders["epsilon"])
    vsd = VSD(score)
    with pytest.raises(ValueError, match="has a LoRA already"):
        VSD(score)
    with pytest.raises(TypeError, match="own `encode`"):
        foreign = ScoreDistillation(score).encode("a red mug")
        vsd(torch.rand(1, 3, 16, 16), foreign, turntable_cameras(1))
    with pytest.raises(ValueError, match="one view per camera"):
        vsd(torch.rand(1, 3, 16, 16), vsd.encode("a"), turntable_cameras(2))
    with pytest.raises(ValueError, match="offload='model'"):
        VSD(load(folders["epsilon"], offload="model"))
    with pytest.raises(ValueError, match="4 channels and lora_score has 3"):
        VSD(load(folders["epsilon"]), lora_score=PixelDiffusion.from_pretrained())
    for name, value in (("lora", "both"), ("rank", 0), ("drop_camera", 1.5), ("clip_norm", 0.0)):
        with pytest.raises(ValueError, match=f"{name}="):
            VsdConfig(**{name: value})
