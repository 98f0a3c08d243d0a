"""The untrained parts of the shipped models: stock classes of diffusers and transformers in small sizes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from picardopt_3d.cameras import CONDITION_SIZE
from picardopt_3d.compat import needs_transformers_5
from picardopt_3d.prompts import ViewWords
from picardopt_3d.world import all_subjects

_START, _END = "<|startoftext|>", "<|endoftext|>"
_GROUPS = 8


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a text encoder.

    Attributes:
        channels: Width.
        layers: Depth.
        heads: Attention heads.
        tokens: Longest caption in tokens.
    """

    channels: int = 64
    layers: int = 2
    heads: int = 4
    tokens: int = 16


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of an image encoder.

    Attributes:
        size: Pixels along a side.
        patch: Pixels along a side of a patch.
        channels: Width.
        layers: Depth.
        heads: Attention heads.
        embedding: Length of the image embedding.
    """

    size: int = 32
    patch: int = 4
    channels: int = 96
    layers: int = 4
    heads: int = 4
    embedding: int = 64


@dataclass(frozen=True)
class UNetSizes:
    """Sizes of a score model.

    Attributes:
        channels: Channels at each resolution; each resolution is half the one before.
        attention: Whether each resolution has self- and cross-attention; the middle always has.
        layers: Residual layers per resolution.
        heads: Attention heads.
        embedding: Width of the time (and camera) embedding.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int = 1
    heads: int = 4
    embedding: int = 128


def build_tokenizer(captions: Iterable[str], tokens: int) -> CLIPTokenizer:
    """Returns a CLIP tokenizer whose byte-pair merges make each word of the captions one token.

    Other words are split into smaller pieces, down to bytes.

    Raises:
        RuntimeError: If transformers is older than 5.
    """
    needs_transformers_5("training")
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    learned = learner.get_vocab()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # In alphabetical order: the learner breaks ties at random, and a resumed run must keep the words' numbers.
    words += sorted(set(learned) - set(words))
    vocabulary = {word: index for index, word in enumerate([*words, _START, _END])}
    merges: Any = _merges_of(learner)  # pairs, which transformers accepts but does not declare
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns the learned merges, best first; only the serialized form has them."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_tokenizer_and_text_encoder(sizes: TextSizes) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Returns a tokenizer for the built-in world's captions, and an untrained text encoder."""
    tokenizer = build_tokenizer(known_texts(), sizes.tokens)
    return tokenizer, CLIPTextModel(text_config(sizes, tokenizer))


def known_texts() -> list[str]:
    """Returns all captions, and the words for the view."""
    captions = [text for subject in all_subjects() for text in subject.captions]
    return [*captions, *(words.strip(", ") for words in ViewWords().texts(""))]


def text_config(sizes: TextSizes, tokenizer: CLIPTokenizer, embedding: int = 0) -> CLIPTextConfig:
    """Returns the configuration of a CLIP text encoder for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.channels,
        intermediate_size=2 * sizes.channels,
        projection_dim=embedding or sizes.channels,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def vision_config(sizes: VisionSizes) -> CLIPVisionConfig:
    """Returns the configuration of a CLIP image encoder."""
    return CLIPVisionConfig(
        hidden_size=sizes.channels,
        intermediate_size=2 * sizes.channels,
        projection_dim=sizes.embedding,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.size,
        patch_size=sizes.patch,
    )


def build_unet(
    sizes: UNetSizes,
    size: int,
    in_channels: int,
    out_channels: int,
    cross_attention: int,
    camera: bool = False,
) -> UNet2DConditionModel:
    """Returns an untrained score model, initialized by torch's global generator.

    Args:
        sizes: Its sizes.
        size: Pixels (or latents) along a side.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        cross_attention: Width of the embeddings that it attends to.
        camera: Whether it takes `Cameras.condition` as a class embedding.
    """
    down = [("CrossAttn" if there else "") + "DownBlock2D" for there in sizes.attention]
    up = [("CrossAttn" if there else "") + "UpBlock2D" for there in reversed(sizes.attention)]
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=sizes.channels,
        layers_per_block=sizes.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=cross_attention,
        attention_head_dim=sizes.heads,  # diffusers' name for the number of heads
        norm_num_groups=_GROUPS,
        time_embedding_dim=sizes.embedding,
        class_embed_type="projection" if camera else None,
        projection_class_embeddings_input_dim=CONDITION_SIZE if camera else None,
    )


def build_autoencoder(size: int, channels: tuple[int, ...], latent: int = 4) -> AutoencoderKL:
    """Returns an untrained autoencoder, in which each resolution after the first is half the one before."""
    return AutoencoderKL(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        latent_channels=latent,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=_GROUPS,
    )


def latent_scheduler() -> DDIMScheduler:
    """Returns Stable Diffusion's noise schedule, for a model that predicts the velocity like SD 2.1."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def half(module: nn.Module) -> Any:
    """Returns a copy in half precision on the CPU, for saving; the module itself is unchanged."""
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():  # saving needs the ordinary layout
        parameter.data = parameter.data.to("cpu", torch.float16).contiguous()
    return copied
