"""Prompts by direction, Perp-Neg, ranges of noise levels: what is said to a model, and how its answers are combined."""

from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance import EncodedText, Prediction, TimestepSchedule
from picardopt_3d.guidance.protocol import as_encoded_text, as_text_prompt
from picardopt_3d.guidance.sds import clip_gradient, guided_noise
from picardopt_3d.prompts import DIRECTIONS, ImagePrompt, PerpNeg, TextPrompt, ViewWords
from torch import Tensor


def encoded(prompt: TextPrompt) -> EncodedText:
    """Each text is its own number."""
    rows = torch.arange(1.0, 1 + len(prompt.texts()))[:, None, None].expand(-1, 2, 3)
    return EncodedText(prompt, rows, torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("azimuth", "elevation", "direction"),
    [
        (0.0, 0.0, "front"),
        (44.9, 0.0, "front"),
        (-44.9, 60.0, "front"),
        (359.0, 0.0, "front"),
        (45.0, 0.0, "side"),
        (90.0, -10.0, "side"),
        (-135.0, 0.0, "side"),
        (135.1, 0.0, "back"),
        (180.0, 0.0, "back"),
        (-179.0, 0.0, "back"),
        (0.0, 60.1, "overhead"),
        (180.0, 90.0, "overhead"),
    ],
)
def test_a_camera_hears_its_direction(azimuth: float, elevation: float, direction: str) -> None:
    prompt = TextPrompt("a chair", views=ViewWords())
    assert prompt.texts()[DIRECTIONS.index(direction)] == f"a chair, {direction} view"
    told = encoded(prompt).at(orbit_cameras(elevation, azimuth))
    assert torch.equal(told.conditional, torch.full((1, 2, 3), 1.0 + DIRECTIONS.index(direction)))
    assert torch.equal(told.unconditional, torch.zeros(1, 2, 3))
    assert len(told.negatives) == len(told.weights) == 0


def test_thresholds_and_words_can_be_chosen() -> None:
    words = ViewWords(
        back="backside view of {prompt}",
        front_threshold=10.0,
        back_threshold=90.0,
        overhead_threshold=20.0,
    )
    cameras = orbit_cameras(torch.tensor([0.0, 0.0, 0.0, 21.0]), torch.tensor([9, 11, 91, 0]))
    assert [DIRECTIONS[i] for i in words.directions(cameras)] == [
        "front",
        "side",
        "back",
        "overhead",
    ]
    assert words.texts("a {odd} one")[2] == "backside view of a {odd} one"


def test_without_words_every_camera_hears_the_same() -> None:
    told = encoded(TextPrompt("a chair")).at(orbit_cameras(0.0, torch.tensor([0.0, 90.0, 180.0])))
    assert torch.equal(told.conditional, torch.ones(3, 2, 3))


def published_perp_neg(azimuth: float, elevation: float) -> tuple[float, list[tuple[int, float]]]:
    """The mixed row and the weighted negative rows, as threestudio's prompt processor has them; rows from 1."""

    def f(a: float, b: float, c: float, r: float) -> float:
        return a * math.exp(-b * r) + c

    front, side, back, overhead = 1, 2, 3, 4
    if elevation > 60:
        return overhead, [(0, 0.0), (0, 0.0)]
    azimuth = abs((azimuth + 180) % 360 - 180)
    if azimuth < 90:
        r = 1 - azimuth / 90
        weights = [(front, -f(4, 0.5, -2.426, r)), (side, -f(4, 0.5, -2.426, 1 - r))]
        return r * front + (1 - r) * side, weights
    r = 2.0 - azimuth / 90
    weights = [(side, -f(1, 0.5, -0.606, r)), (front, -f(1, 0.5, 0.967, r))]
    return r * side + (1 - r) * back, weights


def test_perp_neg_tells_what_was_published() -> None:
    angles = [
        (azimuth, elevation)
        for azimuth in (0.0, 30.0, -60.0, 89.0, 90.0, 120.0, 200.0, 180.0, -170.0)
        for elevation in (-5.0, 61.0)
    ]
    azimuths, elevations = torch.tensor(angles).T
    told = encoded(TextPrompt("a chair", views=ViewWords(), perp_neg=PerpNeg())).at(
        orbit_cameras(elevations, azimuths)
    )
    for index, (azimuth, elevation) in enumerate(angles):
        row, negatives = published_perp_neg(azimuth, elevation)
        assert told.conditional[index, 0, 0].item() == pytest.approx(row, abs=1e-4)
        for number, (negative, weight) in enumerate(negatives):
            assert told.weights[number, index].item() == pytest.approx(weight, abs=1e-4)
            if weight:
                assert told.negatives[number, index, 0, 0].item() == negative


@pytest.mark.parametrize("form", ["uncond", "cond"])
def test_perp_neg_combines_as_published(form: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    predicted = Prediction(draw(3, 4, 8, 8), draw(3, 4, 8, 8), draw(2, 3, 4, 8, 8), draw(2, 3))
    guided = guided_noise(predicted, 7.5, form)  # type: ignore[arg-type]
    for view in range(3):  # one view at a time, in double precision
        conditional, unconditional = (part[view].double() for part in predicted[:2])
        positive = conditional - unconditional
        total = positive.clone()
        for negatives, weights in zip(predicted.negatives, predicted.weights, strict=True):
            negative = negatives[view].double() - unconditional
            along = (negative * positive).sum() / (positive * positive).sum()
            total += weights[view].double() * (negative - along * positive)
        base = unconditional if form == "uncond" else conditional
        torch.testing.assert_close(guided[view].double(), base + 7.5 * total, atol=1e-4, rtol=1e-4)


def test_negatives_along_the_prompt_change_nothing() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    negatives = (unconditional + 2 * (conditional - unconditional))[None]
    weighted = Prediction(conditional, unconditional, negatives, torch.full((1, 2), -3.0))
    plain = guided_noise(Prediction(conditional, unconditional), 5.0)
    torch.testing.assert_close(guided_noise(weighted, 5.0), plain, atol=1e-3, rtol=1e-3)


def test_clipping_limits_entries_and_then_each_views_length() -> None:
    gradient = torch.tensor([[[[3.0, -4.0]]], [[[0.3, 0.4]]]])
    assert clip_gradient(gradient, 3.5, None).flatten().tolist() == pytest.approx(
        [3.0, -3.5, 0.3, 0.4]
    )
    clipped = clip_gradient(gradient, None, 1.0)
    assert clipped.flatten().tolist() == pytest.approx([0.6, -0.8, 0.3, 0.4])
    assert clip_gradient(gradient, None, None) is gradient
    assert clip_gradient(torch.full((1, 3), math.nan), 1.0, 1.0).isnan().all()


@pytest.mark.parametrize(
    ("schedule", "ranges"),
    [
        (TimestepSchedule(), {0: (0.02, 0.98), 999: (0.02, 0.98)}),
        (  # ProlificDreamer
            TimestepSchedule(high=(0.98, 0.5), between=(5000, 5000)),
            {0: (0.02, 0.98), 4999: (0.02, 0.98), 5000: (0.02, 0.5), 9000: (0.02, 0.5)},
        ),
        (  # Zero123
            TimestepSchedule(low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 600)),
            {0: (0.4, 0.85), 300: (0.3, 0.675), 600: (0.2, 0.5), 900: (0.2, 0.5)},
        ),
        (  # DreamGaussian
            TimestepSchedule(low=(1.0, 0.0), high=(1.0, 0.0), clip=(0.02, 0.98)),
            {0: (0.98, 0.98), 250: (0.75, 0.75), 750: (0.25, 0.25), 999: (0.02, 0.02)},
        ),
    ],
)
def test_ranges_move_as_published(
    schedule: TimestepSchedule, ranges: dict[int, tuple[float, float]]
) -> None:
    for step, expected in ranges.items():
        assert schedule.at(step, 1000) == pytest.approx(expected)


def test_bad_prompts_and_schedules_are_named() -> None:
    with pytest.raises(ValueError, match=r"perp_neg without views"):
        TextPrompt("a", perp_neg=PerpNeg())
    with pytest.raises(ValueError, match=r"side='side view'.*\{prompt\}"):
        ViewWords(side="side view")
    with pytest.raises(ValueError, match="back_threshold=91"):
        ViewWords(back_threshold=91)
    with pytest.raises(ValueError, match="give one, that of the image"):
        ImagePrompt(torch.rand(3, 8, 8), orbit_cameras(0.0, torch.zeros(2)))
    with pytest.raises(ValueError, match=r"\[3, height, width\]"):
        ImagePrompt(torch.rand(1, 3, 8, 8), orbit_cameras(0.0, 0.0))
    image = ImagePrompt(torch.rand(3, 8, 8), orbit_cameras(0.0, 0.0))
    with pytest.raises(TypeError, match=r"ImagePrompt.*Zero123"):
        as_text_prompt(image)
    with pytest.raises(TypeError, match="own `encode`"):
        as_encoded_text(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low=\(0.5, 0.5\).*give low <= high"):
        TimestepSchedule(low=(0.5, 0.5), high=(0.6, 0.4))
    with pytest.raises(ValueError, match=r"between=\(5, 3\)"):
        TimestepSchedule(between=(5, 3))
    with pytest.raises(ValueError, match=r"high=.*fractions"):
        TimestepSchedule(high=(980, 980))
