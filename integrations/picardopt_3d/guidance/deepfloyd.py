"""Stage I of DeepFloyd IF as a score model, in pixel space, with T5 as its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.embeddings import Encode, TextEmbeddings, identity
from picardopt_3d.guidance.loading import ModelOptions, load_part, locate
from picardopt_3d.guidance.text_context import TextContext

_UNNEEDED = ("safety_checker", "feature_extractor", "watermarker")
_TEXT_PARTS = ("tokenizer", "text_encoder")
_CLASSES = ("IFPipeline",)
_TOKENS = 77  # T5 takes more, but the UNet was trained with 77


class DeepFloyd(TextDiffusion):
    """The score of DeepFloyd's first stage; a `ScoreModel`.

    Its space is pixels in [-1, 1], 64 along a side. The variance that it predicts besides the noise is not used.

    Args:
        unet: The UNet; its weights are frozen.
        scheduler: Its noise schedule and kind of prediction.
        texts: Embeds texts.
        device: Device of the model.
        options: How the model is run.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        texts: TextEmbeddings,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> None:
        super().__init__(unet, scheduler, texts, unet.config.sample_size, device, options)
        if unet.config.in_channels != 3:
            raise ValueError(
                f"unet takes {unet.config.in_channels} channels: give the first stage (such as "
                f"'DeepFloyd/IF-I-XL-v1.0'), which takes 3; later stages enlarge pictures"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> DeepFloyd:
        """Loads a pipeline folder or a model of the Hugging Face hub.

        Args:
            source: A folder in diffusers' layout, or a hub id such as "DeepFloyd/IF-I-XL-v1.0".
            device: Device of the model.
            options: How the model is loaded and run.

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            PermissionError: The model is gated, as the published ones are.
            ValueError: The pipeline is of another kind.
        """
        from diffusers import DDPMScheduler, UNet2DConditionModel

        from picardopt_3d.compat import T5Tokenizer

        options = options or ModelOptions()
        folder = locate(source, _CLASSES, options, (*_UNNEEDED, "text_encoder"))
        tokenizer = load_part(T5Tokenizer, folder, "tokenizer", options)
        context = TextContext(tokenizer, _TOKENS, lower=True)
        load = partial(_load_t5, source, torch.device(device), options, context)
        key = f"{identity(folder, _TEXT_PARTS)} {options.dtype} {options.variant}"
        return cls(
            load_part(UNet2DConditionModel, folder, "unet", options),
            load_part(DDPMScheduler, folder, "scheduler", options),
            TextEmbeddings(load, key, options.embeddings, torch.device(device), context),
            device,
            options,
        )


def _load_t5(
    source: str | Path, device: torch.device, options: ModelOptions, context: TextContext
) -> Encode:
    from transformers import T5EncoderModel

    folder = locate(source, _CLASSES, options, (*_UNNEEDED, "unet"))
    text_encoder = load_part(T5EncoderModel, folder, "text_encoder", options).to(device).eval()
    return partial(_encode, text_encoder, context)


def _encode(text_encoder: Any, context: TextContext, texts: Sequence[str]) -> Tensor:
    """Returns the last hidden states of texts as in `IFPipeline`: in lower case, with padding masked out."""
    tokens = context.tokenize(texts).to(text_encoder.device)
    embeddings: Tensor = text_encoder(
        tokens.input_ids, attention_mask=tokens.attention_mask
    ).last_hidden_state
    return embeddings
