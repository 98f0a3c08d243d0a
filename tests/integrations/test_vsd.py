from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.guidance.choose import GuidanceConfig, load_guidance
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.protocol import Guidance
from picardopt_3d.guidance.sds import ScoreDistillation
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.vsd import VSD, VsdConfig
from picardopt_3d.methods import METHODS, Context
from picardopt_3d.picard import PicardConfig, PicardOptions, make_optimizer
from picardopt_3d.prompts import TextPrompt, ViewWords
from picardopt_3d.run.drifts import group_names
from picardopt_3d.tolerances import DriftTol
from torch import Tensor
from torch.nn.functional import mse_loss

from picardopt import (
    DriftTolerance,
    ImpureClosureError,
    ParallelPicardOptimizer,
    load_checkpoint,
    save_checkpoint,
    step_rng,
)
from tests.helpers.pool import Pools
from tests.integrations.helpers.tiny_pipelines import save_stable_diffusion

STEPS = 8
IN_MEMORY = ModelOptions(embeddings=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two different models, one of each kind of prediction."""
    path = tmp_path_factory.mktemp("models")
    return {
        "epsilon": save_stable_diffusion(path / "base", seed=0),
        "v_prediction": save_stable_diffusion(path / "v", "v_prediction", seed=1),
    }


def load(folder: Path, **options: Any) -> StableDiffusion:
    return StableDiffusion.from_pretrained(folder, options=ModelOptions(embeddings=None, **options))


def stir(vsd: VSD) -> VSD:
    """A LoRA that has learnt something: its second half starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for parameter in vsd.lora_parameters:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vsd


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


def check_against_the_source(vsd: VSD, folder: Path, lora_folder: Path) -> None:
    """Equation 9 and the LoRA's loss written out with diffusers' own pipeline, schedulers and loss."""
    assert isinstance(vsd, Guidance)
    config, cameras = vsd.config, random_cameras(3)
    prompt = vsd.encode(TextPrompt("a red mug", "blurred", views=ViewWords()))
    views = torch.rand(3, 3, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    vsd(views, prompt, cameras, (0.1, 0.6)).backward()
    learnt = [parameter.grad.clone() for parameter in vsd.lora_parameters]

    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    lora_scheduler = DDPMScheduler.from_pretrained(lora_folder, subfolder="scheduler")
    lora_pipeline = StableDiffusionPipeline.from_pretrained(lora_folder, low_cpu_mem_usage=False)

    def embed(pipe: StableDiffusionPipeline, texts: list[str]) -> Tensor:
        return pipe.encode_prompt(texts, "cpu", 1, False)[0].detach()

    words = ViewWords().directions(cameras).tolist()
    viewed = embed(pipeline, [ViewWords().texts("a red mug")[i] for i in words])
    blurred = embed(pipeline, ["blurred"] * 3)
    plain, lora_blurred = (embed(lora_pipeline, [t] * 3) for t in ("a red mug", "blurred"))
    pose = cameras.camera_to_world.reshape(3, 16)
    unet, lora_unet = pipeline.unet, vsd.lora_score.unet  # one without, one with the LoRA

    again = views.detach().requires_grad_()
    torch.manual_seed(3)
    posterior = pipeline.vae.encode(2 * again - 1).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    latents = latents * pipeline.vae.config.scaling_factor
    t, noise = torch.randint(100, 601, (3,)), torch.randn(latents.shape)
    lora_t, lora_noise = torch.randint(0, 1000, (3,)), torch.randn(latents.shape)
    with torch.no_grad():
        noisy = scheduler.add_noise(latents, noise, t)
        without = unet(noisy, t, blurred).sample
        wanted = without + config.guidance_scale * (unet(noisy, t, viewed).sample - without)
        present = lora_unet(noisy, t, plain, class_labels=pose).sample
        if config.lora_guidance_scale != 1:
            none = lora_unet(noisy, t, lora_blurred, class_labels=0 * pose).sample
            present = none + config.lora_guidance_scale * (present - none)
        abar = scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
        if lora_scheduler.config.prediction_type == "v_prediction":
            present = noisy * (1 - abar).sqrt() + present * abar.sqrt()
        weight = 1 - abar if config.weighting == "sds" else 1.0
        gradient = weight * (wanted - present)
    target = (latents - gradient).detach()
    (0.5 * mse_loss(latents, target, reduction="sum") / 3).backward()
    torch.testing.assert_close(views.grad, again.grad, rtol=1e-3, atol=1e-6)

    noisy = lora_scheduler.add_noise(latents.detach(), lora_noise, lora_t)
    heard = pose * (1 - config.drop_camera)
    predicted = lora_unet(noisy, lora_t, plain, class_labels=heard).sample
    kind = lora_scheduler.config.prediction_type
    target = lora_noise
    if kind == "v_prediction":
        target = lora_scheduler.get_velocity(latents.detach(), lora_noise, lora_t)
    expected = torch.autograd.grad(mse_loss(predicted, target), vsd.lora_parameters)
    for mine, its in zip(learnt, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-3, atol=1e-6)


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


# -- inside the fixed point -------------------------------------------------------------------------------


class Run:
    """A picture that is its own scene, and VSD on it."""

    def __init__(self, folder: Path, lora: str = "inside") -> None:
        torch.manual_seed(1)
        self.vsd = stir(VSD(load(folder), VsdConfig(lora=lora, rank=1)))  # type: ignore[arg-type]
        self.prompt = self.vsd.encode("a red mug")
        self.scene = torch.nn.Parameter(torch.randn(1, 3, 16, 16))
        self.losses: list[Tensor] = []

    def closure(self) -> Callable[[int], Tensor]:
        """A function of the scene and the guidance, not of this object, whose log of losses grows."""
        scene, vsd, prompt = self.scene, self.vsd, self.prompt

        def closure(step: int) -> Tensor:
            for parameter in [scene, *vsd.lora_parameters]:
                parameter.grad = None
            loss = vsd(scene.sigmoid(), prompt, random_cameras(1))
            loss.backward()
            return loss

        return closure

    def signs(self) -> list[torch.optim.Optimizer]:
        """Bases that step by signs alone: a drift at a guess that is nearly right is right in every bit."""
        return [
            torch.optim.Rprop([self.scene], lr=1e-6, step_sizes=(0, 1e-6)),
            torch.optim.Rprop(self.vsd.lora_parameters, lr=1e-7, step_sizes=(0, 1e-7)),
        ]

    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.scene], lr=0.01)

    def wrapped(self) -> ParallelPicardOptimizer:
        scene = self.adam()
        return ParallelPicardOptimizer([scene, *self.vsd.optimizers()], measured=[scene], **OPTIONS)

    def sequential(self, bases: list[torch.optim.Optimizer]) -> Run:
        closure = self.closure()
        for step in range(STEPS):
            with step_rng(7, step):
                self.losses.append(closure(step).detach())
                for base in bases:
                    base.step()
        return self

    def parallel(self, optimizer: ParallelPicardOptimizer) -> Run:
        closure = self.closure()
        for _ in range(STEPS):
            self.losses.append(optimizer.step(closure))
        return self

    def bits(self) -> list[Tensor]:
        return [t.detach() for t in [self.scene, *self.vsd.lora_parameters, *self.losses]]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OPTIONS: dict[str, Any] = {"window": 4, "tolerance": 0.0, "seed": 7, "total_steps": STEPS}


def job(folder: Path, bases: str) -> tuple[bytes, list[int], int]:
    """What one rank ends with: every bit of the run (by value), its strides, its evaluations."""
    run = Run(folder)
    if bases == "signs":
        optimizers = run.signs()
        optimizer = ParallelPicardOptimizer(optimizers, measured=optimizers[:1], **OPTIONS)
    else:
        optimizer = run.wrapped()
    run.parallel(optimizer)
    stats = optimizer.stats
    return pickle.dumps([t.numpy() for t in run.bits()]), stats.strides, stats.drift_evaluations


def as_tensors(dumped: bytes) -> list[Tensor]:
    return [torch.as_tensor(array) for array in pickle.loads(dumped)]


def test_at_tolerance_0_it_is_the_sequential_run_bitwise(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    run.sequential(run.signs())
    dumped, strides, _ = job(folders["epsilon"], "signs")
    assert same(as_tensors(dumped), run.bits())
    assert max(strides) >= 2
    assert sum(strides) == STEPS
    assert not torch.equal(run.scene, Run(folders["epsilon"]).scene)


@pytest.mark.slow
def test_two_processes_at_tolerance_0_are_the_sequential_run_bitwise(
    folders: dict[str, Path], pools: Pools
) -> None:
    run = Run(folders["epsilon"])
    run.sequential(run.signs())
    results = pools(2).run(job, folders["epsilon"], "signs", timeout=280)
    for dumped, strides, _ in results:
        assert same(as_tensors(dumped), run.bits())
        assert max(strides) >= 2


@pytest.mark.slow
def test_the_usual_optimizers_are_exact_too(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    run.sequential([run.adam(), run.vsd.optimizer])
    dumped, _, evaluations = job(folders["epsilon"], "adam")
    assert same(as_tensors(dumped), run.bits())
    assert evaluations > STEPS  # it ran ahead


def test_only_the_scene_and_the_lora_are_in_the_rows(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"])
    optimizer = run.wrapped()
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    lora = sum(p.numel() for p in run.vsd.lora_parameters)
    assert held == run.scene.numel() + lora
    assert lora < 0.1 * sum(p.numel() for p in run.vsd.score.unet.parameters())


def test_the_papers_lora_is_not_exact(folders: dict[str, Path]) -> None:
    """One evaluation a step is its sequential run; a window evaluates more, and its LoRA learns from those too."""
    results = {}
    for window in (1, 4):
        run = Run(folders["epsilon"], "paper")
        assert run.vsd.optimizers() == []
        optimizer = ParallelPicardOptimizer(
            run.adam(), audit="never", **{**OPTIONS, "window": window}
        )
        assert len(optimizer.param_groups) == 1
        results[window] = run.parallel(optimizer).bits()
    run = Run(folders["epsilon"], "paper")
    run.sequential([run.adam(), run.vsd.optimizer])
    assert same(results[1], run.bits())
    assert not same(results[4][:1], run.bits()[:1])


def test_the_papers_lora_is_what_the_audit_looks_for(folders: dict[str, Path]) -> None:
    run = Run(folders["epsilon"], "paper")
    run.vsd.optimizer.param_groups[0]["lr"] = 0.1
    optimizer = ParallelPicardOptimizer(run.adam(), **{**OPTIONS, "tolerance": 1.0})
    with pytest.raises(ImpureClosureError):
        run.parallel(optimizer)


# -- from options -----------------------------------------------------------------------------------------


def small_nerf(**changed: Any) -> Any:
    """The shipped preset with VSD, three steps long and small."""
    preset = METHODS["text-to-3d"]["dreamfusion"].presets["small-nerf"]
    guidance = replace(preset.guidance, loss="vsd")
    return replace(
        preset, **({"guidance": guidance, "steps": 4, "batch": 1, "pixels": 16} | changed)
    )


class CommandRun:
    """A stage as a run loop holds it; what `save` returns is all that goes on."""

    def __init__(self, window: int) -> None:
        config = small_nerf()
        torch.manual_seed(0)
        guidance = load_guidance(config.guidance, "a blue chair", 16, "cpu", vsd=config.vsd)
        prompt = config.guidance.text_prompt("a blue chair")
        self.stage = config.build(Context(guidance, prompt, torch.device("cpu")))
        self.optimizer = ParallelPicardOptimizer(
            self.stage.optimizers(),
            measured=self.stage.measured(),
            carry=self.stage.carry(),
            total_steps=config.steps,
            window=window,
            tolerance=0,
        )

    def closure(self, step: int) -> Any:
        self.optimizer.zero_grad()
        losses = self.stage.loss(step)
        losses.total.backward()
        return losses

    def go_on(self, steps: int) -> CommandRun:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def bits(self) -> list[Tensor]:
        assert isinstance(self.stage.guidance, VSD)
        return [*self.stage.scene.state_dict().values(), *self.stage.guidance.lora_parameters]


def test_a_stage_with_vsd_resumes_bitwise(tmp_path: Path) -> None:
    whole, stopped, again = CommandRun(1).go_on(4), CommandRun(3).go_on(2), CommandRun(3)
    assert not same(again.bits()[-4:], stopped.bits()[-4:])  # the LoRA has learnt
    state = stopped.stage.state_dict() | {"optimizer": stopped.optimizer.state_dict()}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    again.stage.load_state_dict(kept)
    again.optimizer.load_state_dict(kept["optimizer"])
    assert same(again.go_on(2).bits(), whole.bits())
    assert again.optimizer.stats.drift_evaluations > 2  # it ran ahead


def test_the_lora_is_judged_too_and_by_its_own_loss(folders: dict[str, Path]) -> None:
    stage = CommandRun(1).stage
    scene, lora = stage.optimizers()
    assert stage.measured() == [scene, lora]
    assert group_names(stage.measured())[-1] == "lora"
    for tolerance in (None, DriftTol(noise=0.05)):
        optimizer = make_optimizer(stage, PicardOptions(PicardConfig(2, tolerance)), 4, 0)
        assert isinstance(optimizer.tolerance, DriftTolerance)
        assert optimizer.tolerance.losses == (len(scene.param_groups), 1)
        assert optimizer.tolerance.noise == (0.2 if tolerance is None else 0.05)
    held = {id(p) for group in lora.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.guidance.lora_parameters}


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
