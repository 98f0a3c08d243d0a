"""Runs whose slots share the guidance's calls are, to rounding, those whose slots call it each for itself."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import Cameras, random_cameras
from picardopt_3d.guidance import (
    Encoded,
    EncodedText,
    ExactScore,
    Guidance,
    Prediction,
    RenderedSubjects,
    ScoreDistillation,
)
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.vsd import VSD, VsdConfig
from picardopt_3d.methods import METHODS
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.world import Subject
from torch import Tensor

from picardopt import ParallelPicardOptimizer
from picardopt.audit.sharing import CallSharing
from picardopt.cli import main
from picardopt.stats import Stats
from tests.integrations.helpers.recipes import (
    OF_ONE_STAGE,
    ahead,
    ball,
    build,
    save_pipelines,
    tiny,
    tiny_texture,
    wrapped,
)

STEPS, WINDOW = 12, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("models"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets every slot make its own calls from now on."""
    return lambda: monkeypatch.setattr(CallSharing, "allowed", lambda *_: None)


@dataclass
class Ran:
    """What a run ends with: the parameters before and after, the losses, what the optimizer counted."""

    before: Tensor
    after: Tensor
    losses: Tensor
    stats: Stats


def flat(tensors: Iterator[torch.nn.Parameter]) -> Tensor:
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def run_stage(stage: Any, window: int = WINDOW) -> Ran:
    """All guesses are accepted, so that both runs evaluate the same steps at the same guesses."""
    before = flat(stage.scene.parameters()).clone()
    optimizer = wrapped(stage, STEPS, 3, window=window, tolerance=torch.inf, audit="never")
    losses = [float(each.total) for each in ahead(stage, optimizer, STEPS)]
    return Ran(before, flat(stage.scene.parameters()), torch.tensor(losses), optimizer.stats)


def check_equal_but_for_rounding(joined: Ran, alone: Ran) -> None:
    assert alone.stats.calls_saved == 0
    assert joined.stats.calls_saved >= joined.stats.joined_calls > 0
    assert joined.stats.strides == alone.stats.strides
    torch.testing.assert_close(joined.losses, alone.losses, rtol=1e-3, atol=1e-6)
    if len(joined.before) == len(joined.after):
        way = (alone.after - alone.before).norm()
        assert (joined.after - alone.after).norm() < 1e-3 * way
    assert joined.after.shape == alone.after.shape


@pytest.mark.parametrize(("command", "name"), OF_ONE_STAGE)
def test_a_recipe_joined_is_the_recipe_alone_to_rounding(
    command: str, name: str, folders: dict[str, Path], alone: Callable[[], None]
) -> None:
    """Over a change of batch and size, within one window too."""
    config = replace(tiny(command, name, folders), steps=STEPS)
    joined = run_stage(build(config))
    alone()
    check_equal_but_for_rounding(joined, run_stage(build(config)))


@pytest.mark.parametrize("command", METHODS)
def test_denoising_joined_is_denoising_alone_to_rounding(
    command: str, folders: dict[str, Path], alone: Callable[[], None]
) -> None:
    """Each slot has drawn its own number of denoising steps."""
    config = replace(tiny_texture(command, folders), steps=STEPS)
    joined = run_stage(build(config, previous=ball()))
    alone()
    check_equal_but_for_rounding(joined, run_stage(build(config, previous=ball())))


class Picture:
    """A picture that is its own scene, under a guidance."""

    def __init__(self, guidance: Guidance, text: str = "a red cube") -> None:
        self.guidance, self.prompt = guidance, guidance.encode(text)
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.nn.Parameter(torch.randn(2, 3, 16, 16, generator=generator))

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The picture, and what the guidance learns."""
        yield self.pixels
        for base in self.guidance.optimizers():
            for group in base.param_groups:
                yield from group["params"]

    def run(self, window: int = WINDOW, tolerance: float = torch.inf) -> Ran:
        before, losses = flat(self.parameters()).clone(), []
        parameters, pixels = list(self.parameters()), self.pixels
        guidance, prompt = self.guidance, self.prompt

        def closure() -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            loss = guidance(pixels.sigmoid(), prompt, random_cameras(2))
            loss.backward()
            return loss

        optimizer = ParallelPicardOptimizer(
            [torch.optim.Adam([pixels], lr=0.02), *guidance.optimizers()],
            window=window,
            tolerance=tolerance,
            total_steps=STEPS,
            seed=4,
            audit="never",
        )
        for _ in range(STEPS):
            losses.append(float(optimizer.step(closure)))
        return Ran(before, flat(self.parameters()), torch.tensor(losses), optimizer.stats)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_vsd_joined_is_vsd_alone_to_rounding(
    scale: float, folders: dict[str, Path], alone: Callable[[], None]
) -> None:
    """The pretrained score is joined; the LoRA, whose weights differ by slot, is not."""

    def picture() -> Picture:
        options = ModelOptions(embeddings=None)
        score = StableDiffusion.from_pretrained(folders["stable-diffusion"], options=options)
        config = VsdConfig(learning_rate=1e-3, lora_guidance_scale=scale)
        vsd = VSD(score, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for parameter in vsd.lora_parameters:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return Picture(vsd)

    joined = picture().run()
    alone()
    check_equal_but_for_rounding(joined, picture().run())


def test_at_tolerance_0_nothing_is_joined_and_bits_are_those_of_a_window_of_1() -> None:
    def picture() -> Picture:
        score = ExactScore(RenderedSubjects([Subject("cube", "red")], 16))
        return Picture(ScoreDistillation(score))

    early, one = picture().run(tolerance=0.0), picture().run(window=1)
    assert early.stats.calls_saved == 0
    assert early.stats.drift_evaluations > STEPS
    assert torch.equal(early.after, one.after)
    assert torch.equal(early.losses, one.losses)


class Plain:
    """A score model that somebody else wrote: it draws on its way, and says nothing of joining."""

    size = 16

    def __init__(self) -> None:
        self.inner = ExactScore(RenderedSubjects([Subject("cube", "red")], 16))
        self.alphas_cumprod = self.inner.alphas_cumprod

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        return self.inner.encode(prompt)

    def to_model_space(self, views: Tensor) -> Tensor:
        return self.inner.to_model_space(views) + 0.1 * torch.randn(views.shape)

    def to_views(self, clean: Tensor) -> Tensor:
        return self.inner.to_views(clean)

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        return self.inner.predict_noise(noisy, timesteps, prompt, cameras)


class Pull(Guidance):
    """A guidance that somebody else wrote."""

    size = 16

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        return Plain().encode(prompt)

    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        return (views - torch.rand(views.shape)).square().mean()


@pytest.mark.parametrize("made", [lambda: ScoreDistillation(Plain()), Pull])
def test_what_says_nothing_of_joining_is_evaluated_step_by_step(
    made: Callable[[], Guidance],
) -> None:
    ahead, one = Picture(made()).run(), Picture(made()).run(window=1)
    assert ahead.stats.joined_calls == 0
    assert max(ahead.stats.strides) > 1
    assert torch.equal(one.losses[:1], ahead.losses[:1])
    exact = Picture(made()).run(tolerance=0.0)
    assert torch.equal(exact.after, one.after)


def test_where_joined_calls_exceed_the_memory_slots_call_for_themselves(
    folders: dict[str, Path], alone: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the call that failed had in memory is free again by then."""
    options = ModelOptions(embeddings=None)
    score = StableDiffusion.from_pretrained(folders["stable-diffusion"], options=options)
    forward, held = score.unet.forward, []

    def small_device(sample: Tensor, *rest: Any, **more: Any) -> Any:
        assert not [ref for ref in held if ref() is not None]
        if len(sample) > 4:  # two views, with and without the prompt
            activations = sample.repeat(1, 2, 1, 1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(sample, *rest, **more)

    monkeypatch.setattr(score.unet, "forward", small_device)
    with pytest.warns(UserWarning, match=r"(?s)20\.00 MiB.*called for each from now on"):
        joined = Picture(ScoreDistillation(score)).run()
    assert held
    assert joined.stats.joined_calls == 0
    alone()
    assert torch.equal(joined.after, Picture(ScoreDistillation(score)).run().after)


@pytest.mark.parametrize(("views", "joined"), [(4, True), (3, False)])
def test_steps_that_share_no_pass_do_not_wait_for_each_other(
    views: int, joined: bool, folders: dict[str, Path]
) -> None:
    options = ModelOptions(embeddings=None, joined_views=views)
    score = StableDiffusion.from_pretrained(folders["stable-diffusion"], options=options)
    ran = Picture(ScoreDistillation(score)).run()
    assert max(ran.stats.strides) > 1
    assert (ran.stats.joined_calls > 0) is joined


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_joins_and_says_so(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One worker has four slots; of two workers, each."""
    options = ["--workers", str(workers), "--window", str(4 * workers), "--tolerance", "inf"]
    recipe = {"steps": 40, "pixels": 16, "batch": 1, "guidance.model": "exact", "scene.samples": 8}
    for name, value in recipe.items():
        options += [f"--recipe.{name}", str(value)]
    out = tmp_path / "cube"
    few = ["--picture-every", "0", "--device", "cpu"]
    assert main(["text-to-3d", "a red cube", "--out", str(out), *few, *options]) == 0
    report = json.loads((out / "report.json").read_text())
    joined, saved = report["joined_calls"], report["calls_saved"]
    assert 0 < joined <= report["sweeps"]
    assert 2 * joined < saved <= 3 * joined
    found = re.search(r"(\d+) calls of the guidance made as (\d+);", capfd.readouterr().out)
    assert found is not None
    assert [int(each) for each in found.groups()] == [joined + saved, joined]
