"""CLIP as a judge: it finds the text that fits a picture best, and computes features to compare sets of pictures."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from picardopt_3d.compat import CLIPImageProcessorPil, CLIPTokenizer, pooled, precision
from picardopt_3d.guidance.loading import HUB_ID, explained
from picardopt_3d.guidance.text_context import TextContext

SHIPPED_CLIP = Path(__file__).parents[1] / "weights" / "clip"
"""The judge that ships with the package; it knows only the built-in world."""


class ClipJudge:
    """Finds the caption that fits a view best.

    Args:
        source: Folder or hub id of a CLIP model with tokenizer and image processor; by default the shipped one.
        captions: The captions to choose from; by default those of all subjects of the built-in world, in their order.
        device: Device of the model.

    Attributes:
        name: Name of the model in tables: its folder's name or its hub id.
        texts: Unit embeddings of the captions, `[captions, features]`.

    Raises:
        FileNotFoundError: The folder is missing or incomplete, or the hub has no such model or cannot be reached.
        PermissionError: The model is gated.
        ValueError: The model is not a CLIP model.
    """

    def __init__(
        self,
        source: str | Path = SHIPPED_CLIP,
        captions: Sequence[str] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_kind(source)
        self.name = Path(source).name if Path(source).is_dir() else str(source)
        with explained(source), _loaded_whole(source):
            model: Any = CLIPModel.from_pretrained(source, **precision(CLIPModel, torch.float32))
            # Pillow's, even if torchvision is installed: features must not depend on other packages.
            self.processor: Any = CLIPImageProcessorPil.from_pretrained(source)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(source)
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.texts = self.text_features(_world_captions() if captions is None else captions)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns unit embeddings of texts, shortened to the model's length, `[texts, features]`."""
        if not texts:
            return torch.zeros(0, self.model.config.projection_dim, device=self.device)
        longest = min(
            self._tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings
        )
        tokens = TextContext(self._tokenizer, longest).tokenize(texts).input_ids
        features = pooled(self.model.get_text_features(input_ids=tokens.to(self.device)))
        return functional.normalize(features, dim=-1)

    @torch.no_grad()
    def image_features(self, pictures: Tensor | Sequence[Image.Image]) -> Tensor:
        """Returns embeddings of pictures, which are not normalized.

        Args:
            pictures: RGB views in [0, 1], `[views, 3, height, width]`, or opened pictures of any size.

        Returns:
            The embeddings, `[pictures, features]`.
        """
        if isinstance(pictures, Tensor):
            images: Any = [
                (view.permute(1, 2, 0) * 255).round().byte().numpy() for view in pictures.cpu()
            ]
        else:
            images = [picture.convert("RGB") for picture in pictures]
        pixels = self.processor(images=images, return_tensors="pt").pixel_values
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def similarity(self, views: Tensor) -> Tensor:
        """Returns the cosine similarities of RGB views in [0, 1] and the captions, `[views, captions]`."""
        return functional.normalize(self.image_features(views), dim=-1) @ self.texts.T

    def fingerprint(self) -> str:
        """Returns a hash of the image encoder's weights and its normalization of pixels."""
        digest = hashlib.sha256()
        for part in (self.model.vision_model, self.model.visual_projection):
            for name, value in sorted(part.state_dict().items()):
                digest.update(f"{name} {tuple(value.shape)}\n".encode())
                digest.update(value.cpu().float().contiguous().numpy().tobytes())
        digest.update(f"{self.processor.image_mean} {self.processor.image_std}".encode())
        return digest.hexdigest()


def _world_captions() -> list[str]:
    """Returns the captions that the shipped model was trained on."""
    # Imported here because the built-in world is needed only without other captions.
    from picardopt_3d.world import all_subjects

    return [subject.caption for subject in all_subjects()]


def _check_kind(source: str | Path) -> None:
    """Checks that a source is a CLIP model, before it is downloaded.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: The source is not a CLIP model.
    """
    if Path(source).is_dir():
        config = Path(source) / "config.json"
        if not config.is_file():
            raise FileNotFoundError(
                f"clip={str(source)!r} has no config.json: give the folder of a CLIPModel, as save_pretrained writes it"
            )
    elif not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"clip={str(source)!r}: there is no such folder; give the folder of a CLIPModel, or a hub id such as "
            f"'openai/clip-vit-base-patch32'"
        )
    else:
        from huggingface_hub import hf_hub_download

        with explained(source):
            config = Path(hf_hub_download(source, "config.json"))
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"clip={str(source)!r}: its config.json cannot be read ({error}); give a complete folder"
        ) from error
    if kind != "clip":
        raise ValueError(
            f"clip={str(source)!r} holds a model of type {kind!r}: give a CLIPModel (of type 'clip')"
        )


@contextlib.contextmanager
def _loaded_whole(source: str | Path) -> Iterator[None]:
    """Names the model in errors about a damaged part of it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"clip={str(source)!r} could not be loaded: {error}; give a complete folder, with the weights, the "
            f"tokenizer and the image processor"
        ) from error
