from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras, turntable_cameras
from picardopt_3d.guidance import (
    Encoded,
    EncodedText,
    ExactScore,
    Guidance,
    KnownViews,
    Prediction,
    RenderedSubjects,
    ScoreDistillation,
    ScoreModel,
    SdsConfig,
)
from picardopt_3d.guidance.draws import draw_timesteps
from picardopt_3d.guidance.exact_score import cosine_schedule
from picardopt_3d.guidance.protocol import (
    as_text_prompt,
    model_space_to_pixels,
    pixels_to_model_space,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.world import Subject, render
from torch import Tensor

SUBJECTS = (Subject("cube", "red"), Subject("mug", "blue"), Subject("cube", "green"))


class LinearScore:
    """A score model whose answers are simple enough to write down: noise = a noisy + b t."""

    size = 8

    def __init__(self) -> None:
        self.alphas_cumprod = cosine_schedule(100)
        self.saw_gradients = False

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        asked = as_text_prompt(prompt)
        lengths = torch.tensor([float(len(text)) for text in asked.texts()])
        return EncodedText(asked, lengths[:, None], torch.tensor([[float(len(asked.negative))]]))

    def to_model_space(self, views: Tensor) -> Tensor:
        return pixels_to_model_space(views, self.size)

    def to_views(self, clean: Tensor) -> Tensor:
        return model_space_to_pixels(clean)

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        self.saw_gradients |= noisy.requires_grad
        assert isinstance(prompt, EncodedText)
        told = prompt.at(cameras)
        level = timesteps[:, None, None, None] / 100
        conditional = 0.5 * noisy + 0.1 * told.conditional[..., None, None] * level
        return Prediction(conditional, 0.5 * noisy + told.unconditional[..., None, None])


WEIGHTS = {
    "sds": lambda abar: 1 - abar,
    "uniform": lambda abar: 1.0,
    "fantasia3d": lambda abar: abar**0.5 * (1 - abar),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("form", ["uncond", "cond"])
def test_the_gradient_is_that_of_the_paper(weighting: str, form: str) -> None:
    score = LinearScore()
    config = SdsConfig(guidance_scale=3.0, weighting=weighting, guidance_form=form)  # type: ignore[arg-type]
    guidance = ScoreDistillation(score, config)
    prompt, cameras = guidance.encode("abcd"), turntable_cameras(5)
    views = torch.rand(5, 3, 8, 8, requires_grad=True)
    torch.manual_seed(7)
    loss = guidance(views, prompt, cameras, (0.1, 0.9))
    loss.backward()

    # Equation 3, directly, on the same noise.
    torch.manual_seed(7)
    timesteps = torch.randint(10, 91, (5,))
    noise = torch.randn(5, 3, 8, 8)
    abar = score.alphas_cumprod[timesteps].view(5, 1, 1, 1)
    noisy = abar.sqrt() * (2 * views.detach() - 1) + (1 - abar).sqrt() * noise
    conditional, unconditional, *_ = score.predict_noise(noisy, timesteps, prompt, cameras)
    if form == "uncond":
        guided = unconditional + 3 * (conditional - unconditional)
    else:
        guided = conditional + 3 * (conditional - unconditional)
    gradient = WEIGHTS[weighting](abar) * (guided - noise) / 5
    torch.testing.assert_close(views.grad, 2 * gradient)  # 2 from x = 2 view - 1
    assert loss.item() == pytest.approx(0.5 * 5 * gradient.square().sum().item(), rel=1e-4)
    assert not score.saw_gradients


@pytest.mark.parametrize("limit", ["clip_value", "clip_norm"])
def test_the_gradient_is_clipped_where_it_is_said(limit: str) -> None:
    """In the model's space, before it goes back through the resizing and before the mean over the batch."""
    views = torch.rand(2, 3, 8, 8, requires_grad=True)

    def gradient(config: SdsConfig) -> Tensor:
        guidance = ScoreDistillation(LinearScore(), config)
        torch.manual_seed(7)
        loss = guidance(views, guidance.encode("abc"), turntable_cameras(2), (0.5, 0.9))
        return torch.autograd.grad(loss, views)[0] * 2 / 2  # the batch; x = 2 view - 1

    plain = gradient(SdsConfig())
    size = plain.abs() if limit == "clip_value" else plain.flatten(1).norm(dim=1)
    clipped = gradient(SdsConfig(**{limit: size.mean().item()}))  # type: ignore[arg-type]
    if limit == "clip_value":
        expected = plain.clamp(-size.mean(), size.mean())
    else:
        expected = plain * (size.mean() / size).clamp(max=1).view(2, 1, 1, 1)
    torch.testing.assert_close(clipped, expected)
    assert not torch.equal(clipped, plain)


def test_views_of_another_size_are_resized_and_get_a_gradient() -> None:
    guidance = ScoreDistillation(LinearScore())
    views = torch.rand(2, 3, 20, 12, requires_grad=True)
    guidance(views, guidance.encode("abc"), turntable_cameras(2)).backward()
    assert views.grad is not None
    assert views.grad.shape == views.shape
    assert views.grad.abs().sum() > 0


def test_the_loss_is_a_function_of_torchs_global_generator() -> None:
    guidance = ScoreDistillation(ExactScore(RenderedSubjects(SUBJECTS, size=16)))
    prompt, cameras, views = (
        guidance.encode("a red cube"),
        turntable_cameras(2),
        torch.rand(2, 3, 16, 16),
    )

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return guidance(views, prompt, cameras).item()

    assert loss(1) == loss(1) != loss(2)


def test_noise_levels_cover_the_range_and_no_more() -> None:
    torch.manual_seed(0)
    assert set(draw_timesteps(2000, (0.2, 0.3), 100).tolist()) == set(range(20, 31))
    assert set(draw_timesteps(2000, (0.97, 1.0), 100).tolist()) == {97, 98, 99}
    assert draw_timesteps(3, (0.5, 0.5), 100).tolist() == [50, 50, 50]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="weighting='snr'"):
        SdsConfig(weighting="snr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_norm=0"):
        SdsConfig(clip_norm=0)
    guidance = ScoreDistillation(LinearScore())
    prompt = guidance.encode("a")
    with pytest.raises(ValueError, match="one view per camera"):
        guidance(torch.rand(2, 3, 8, 8), prompt, turntable_cameras(3))
    with pytest.raises(ValueError, match="timestep_range"):
        guidance(torch.rand(2, 3, 8, 8), prompt, turntable_cameras(2), (0.9, 0.1))


def test_everything_keeps_the_protocols() -> None:
    score = ExactScore(RenderedSubjects(SUBJECTS))
    assert isinstance(score, ScoreModel)
    assert isinstance(ScoreDistillation(score), Guidance)


def brute_force_mean(noisy: Tensor, abar: float, views: Tensor, log_prior: Tensor) -> Tensor:
    """Bayes' rule in double precision, one view at a time."""
    noise_model = torch.distributions.Normal(0.0, math.sqrt(1 - abar))
    logs = [
        log_prior[i].double()
        + noise_model.log_prob(noisy.double() - math.sqrt(abar) * view.double()).sum()
        for i, view in enumerate(views)
    ]
    weights = torch.stack(logs).softmax(0)
    return sum(
        (weight * view for weight, view in zip(weights, views.double(), strict=True)),
        torch.zeros(()),
    )


@pytest.mark.parametrize("level", [20, 300, 700, 950])
def test_the_exact_score_is_the_posterior_mean(level: int) -> None:
    score = ExactScore(RenderedSubjects(SUBJECTS, size=16))
    cameras = random_cameras(2)
    views = torch.stack([2 * render(s, cameras, 16, 16)[0] - 1 for s in SUBJECTS], dim=1)
    abar = score.alphas_cumprod[level].item()
    generator = torch.Generator().manual_seed(level)
    noisy = math.sqrt(abar) * views[:, 1] + math.sqrt(1 - abar) * torch.randn(
        views[:, 1].shape, generator=generator
    )
    predicted = score.predict_noise(
        noisy, torch.tensor([level, level]), score.encode("a red cube"), cameras
    )
    for index in range(2):
        mean = brute_force_mean(noisy[index], abar, views[index], torch.zeros(3))
        implied = (noisy[index] - math.sqrt(abar) * mean) / math.sqrt(1 - abar)
        torch.testing.assert_close(
            predicted.unconditional[index].double(), implied, atol=1e-4, rtol=1e-3
        )
        only = (noisy[index] - math.sqrt(abar) * views[index, 0]) / math.sqrt(1 - abar)
        torch.testing.assert_close(predicted.conditional[index], only, atol=1e-5, rtol=1e-4)


def test_the_gradient_over_an_exact_score_is_bayes_rules() -> None:
    cameras = turntable_cameras(3, elevation=10.0)
    guidance = ScoreDistillation(
        ExactScore(RenderedSubjects(SUBJECTS, size=16)), SdsConfig(guidance_scale=5.0)
    )
    views = torch.rand(3, 3, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    guidance(views, guidance.encode("a blue mug"), cameras).backward()
    torch.manual_seed(3)
    timesteps, noise = torch.randint(20, 981, (3,)), torch.randn(3, 3, 16, 16)
    known = torch.stack([2 * render(s, cameras, 16, 16)[0] - 1 for s in SUBJECTS], dim=1)
    assert views.grad is not None
    for i, timestep in enumerate(timesteps):
        abar = guidance.score.alphas_cumprod[timestep].item()
        noisy = math.sqrt(abar) * (2 * views.detach()[i] - 1) + math.sqrt(1 - abar) * noise[i]
        mean = brute_force_mean(noisy, abar, known[i], torch.zeros(3))
        means = mean + 5 * (known[i, 1] - mean)  # guidance acts on means as on noises
        guided = (noisy - math.sqrt(abar) * means) / math.sqrt(1 - abar)
        direct = (1 - abar) * (guided - noise[i]) / 3
        torch.testing.assert_close(views.grad[i].double(), 2 * direct, atol=1e-3, rtol=1e-3)


def test_known_views_count_by_their_distance_from_the_camera() -> None:
    known = turntable_cameras(12, elevation=20.0)
    subject = Subject("chair", "red")
    views = render(subject, known, 16, 16)[0]
    score = ExactScore(KnownViews(views, known, [subject.caption] * 12, bandwidth=10.0))
    camera = orbit_cameras(20.0, 97.0)
    noisy, level = torch.randn(1, 3, 16, 16), torch.tensor([999])
    predicted = score.predict_noise(noisy, level, score.encode("a red chair"), camera)
    angle = torch.acos(
        (torch.nn.functional.normalize(known.position, dim=-1) @ camera.position[0] / 1.65).clamp(
            -1, 1
        )
    )
    log_prior = -0.5 * (torch.rad2deg(angle) / 10.0).square()
    abar = score.alphas_cumprod[999].item()
    mean = brute_force_mean(noisy[0], abar, 2 * views - 1, log_prior)
    implied = (noisy[0] - math.sqrt(abar) * mean) / math.sqrt(1 - abar)
    torch.testing.assert_close(predicted.conditional[0].double(), implied, atol=1e-4, rtol=1e-3)
    assert torch.equal(predicted.conditional, predicted.unconditional)


def test_the_exact_score_says_what_it_knows() -> None:
    score = ExactScore(RenderedSubjects(SUBJECTS))
    assert score.encode("a 3d render of a red cube").conditional.tolist() == [[True, False, False]]
    assert score.encode("a red cube").unconditional.all()
    with pytest.raises(ValueError, match=r"a yellow torus.*a red cube"):
        score.encode("a yellow torus")
    with pytest.raises(ValueError, match="bandwidth"):
        KnownViews(torch.rand(1, 3, 8, 8), turntable_cameras(1), ["x"], bandwidth=0.0)


def test_descending_the_exact_score_gives_the_view() -> None:
    """Pixels optimized by SDS against the exact score become the true view."""
    cameras = turntable_cameras(1, elevation=30.0)
    views = torch.cat([render(subject, cameras, 16, 16)[0] for subject in SUBJECTS])
    known = KnownViews(
        views, cameras[torch.zeros(3, dtype=torch.int64)], [s.caption for s in SUBJECTS]
    )
    guidance = ScoreDistillation(ExactScore(known), SdsConfig(guidance_scale=1.0))
    prompt, true = guidance.encode("a blue mug"), views[1:2]
    logits = torch.zeros(1, 3, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    torch.manual_seed(0)
    for _ in range(100):
        optimizer.zero_grad()
        guidance(logits.sigmoid(), prompt, cameras).backward()
        optimizer.step()
    error = (logits.sigmoid() - true).square().mean().item()
    assert -10 * math.log10(error) > 25
