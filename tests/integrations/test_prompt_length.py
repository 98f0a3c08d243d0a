"""Prompts that are longer than a text encoder reads: what is left out is said, and the view words stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from picardopt_3d.guidance.text_context import TextContext
from picardopt_3d.guidance.vsd import VSD
from picardopt_3d.prompts import TextPrompt, ViewWords

from tests.integrations.helpers.tiny_pipelines import (
    clip_tokenizer,
    save_deepfloyd,
    save_stable_diffusion,
    t5_tokenizer,
)

WORDS = [*["red", "a", "cub", "b"] * 29, "a", "b", "painted", "red"]  # 120
PROMPT = " ".join(WORDS)
OPTIONS = ModelOptions(embeddings=None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    folder = tmp_path_factory.mktemp("hub")
    save_stable_diffusion(folder / "sd", tokens=32)
    save_deepfloyd(folder / "if")
    return {
        "stable diffusion": lambda: StableDiffusion.from_pretrained(folder / "sd", options=OPTIONS),
        "deepfloyd": lambda: DeepFloyd.from_pretrained(folder / "if", options=OPTIONS),
        "shipped": lambda: PixelDiffusion.from_pretrained(options=OPTIONS),
    }


def left_out(caught: pytest.WarningsRecorder) -> str:
    """What the one warning names."""
    (warning,) = caught
    return str(warning.message).split(" is left out: ")[1].removesuffix("'").removeprefix("'")


@pytest.mark.parametrize("name", ["stable diffusion", "deepfloyd", "shipped"])
def test_the_view_words_stay_and_what_is_left_out_is_named(
    models: dict[str, Callable[[], Any]], name: str
) -> None:
    score = models[name]()
    with pytest.warns(UserWarning, match="tokens") as caught:
        encoded = score.encode(TextPrompt(PROMPT, views=ViewWords()))
    gone = left_out(caught)
    assert gone.endswith("painted red")
    assert PROMPT.endswith(gone)
    kept = PROMPT.removesuffix(gone).strip()
    assert kept
    assert f"{kept} {gone}" == PROMPT  # nothing in between, no word in parts
    # What is kept fits, so that encoding it warns of nothing (here a warning is an error).
    short = score.encode(TextPrompt(kept, views=ViewWords()))
    assert torch.equal(encoded.conditional, short.conditional)
    assert not torch.equal(encoded.conditional[0], encoded.conditional[1])
    # One word more would not.
    with pytest.warns(UserWarning, match=gone.split()[0]):
        score.encode(TextPrompt(f"{kept} {gone.split()[0]}", views=ViewWords()))


@pytest.mark.parametrize("name", ["stable diffusion", "deepfloyd", "shipped"])
def test_without_view_words_and_for_the_negative_prompt_too(
    models: dict[str, Callable[[], Any]], name: str
) -> None:
    score = models[name]()
    with pytest.warns(UserWarning, match="prompt") as caught:
        plain = score.encode(PROMPT)
    assert left_out(caught).endswith("painted red")
    assert plain.prompt.text in PROMPT  # what was encoded
    with pytest.warns(UserWarning, match="negative") as caught:
        score.encode(TextPrompt("red", negative=PROMPT))
    assert left_out(caught).endswith("painted red")


def test_a_pipeline_that_is_called_with_captions_says_it_too() -> None:
    pipeline = PixelDiffusion.from_pretrained(options=OPTIONS).pipeline
    with pytest.warns(UserWarning, match="tokens") as caught:
        long = pipeline.encode([PROMPT, "a red cube"])
    assert left_out(caught).endswith("painted red")
    assert torch.equal(long[1:], pipeline.encode(["a red cube"]))


def test_the_judge_says_it_too() -> None:
    with pytest.warns(UserWarning, match="tokens") as caught:
        ClipJudge(captions=[PROMPT, "a red cube"])
    assert left_out(caught).endswith("painted red")


def test_vsd_warns_once_and_its_lora_gets_the_same_prompt(
    models: dict[str, Callable[[], Any]],
) -> None:
    score = models["stable diffusion"]()
    with pytest.warns(UserWarning, match="tokens") as caught:
        encoded = VSD(score).encode(TextPrompt(PROMPT, views=ViewWords()))
    assert left_out(caught).endswith("painted red")
    assert encoded.plain.prompt.text == encoded.prompt.text


def test_a_kept_embedding_is_warned_of_as_well(tmp_path: Path) -> None:
    """The second run reads its embeddings from the disk; its prompt is cut all the same."""
    folder = save_stable_diffusion(tmp_path / "sd")
    options = ModelOptions(embeddings=tmp_path / "kept")
    rows = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="tokens"):
            rows.append(StableDiffusion.from_pretrained(folder, options=options).encode(PROMPT))
    assert torch.equal(rows[0].conditional, rows[1].conditional)


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), t5_tokenizer()], ids=["clip", "t5"])
@pytest.mark.parametrize("template", ["{prompt}, a", "a b {prompt}", "b {prompt} c"])
def test_the_longest_prompt_that_fits_is_kept(tokenizer: Any, template: str) -> None:
    """Against trying every prefix of whole words."""
    views = ViewWords(front="{prompt}", side=template, back="{prompt}", overhead="{prompt}")
    context = TextContext(tokenizer, tokens=16)

    def fits(count: int) -> bool:
        text = template.replace("{prompt}", " ".join(WORDS[:count]))
        return len(tokenizer(text, verbose=False).input_ids) <= 16

    longest = max(count for count in range(len(WORDS) + 1) if fits(count))
    assert 0 < longest < 16
    with pytest.warns(UserWarning, match="view words"):
        kept = context.shorten(TextPrompt(PROMPT, views=views))
    assert kept.text == " ".join(WORDS[:longest])


def test_what_fits_is_left_as_it_is() -> None:
    context = TextContext(clip_tokenizer(), tokens=16)
    exactly = TextPrompt("  a  b\nc d e f g h i j, red ", views=None)  # with begin and end 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert context.shorten(exactly) is exactly


def test_a_text_without_spaces_is_cut_between_characters() -> None:
    context = TextContext(clip_tokenizer(), tokens=16)
    with pytest.warns(UserWarning, match="left out: 'oooo'"):
        assert context.shorten(TextPrompt("o" * 18)).text == "o" * 14


def test_view_words_that_do_not_fit_are_refused() -> None:
    context = TextContext(clip_tokenizer(), tokens=16)
    words = ViewWords(back="{prompt}, seen from behind")
    with pytest.raises(ValueError, match=r"back='\{prompt\}, seen from behind'.*16 tokens"):
        context.shorten(TextPrompt("red", views=words))
