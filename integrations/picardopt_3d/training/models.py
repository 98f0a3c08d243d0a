"""The guidance model's parts, from scratch: stock diffusers and transformers classes in small sizes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from picardopt_3d.cameras import CONDITION_SIZE
from picardopt_3d.guidance.text_to_view import TextToViewPipeline

_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Attributes:
        size: Pixels along a side.
        channels: UNet channels at each resolution, each resolution half of the one before; attention at the last.
        layers: Residual layers a resolution.
        heads: Attention heads.
        embedding: Width of the time and camera embedding.
        text_channels: Width of the text encoder.
        text_layers: Depth of the text encoder.
        tokens: Longest caption in tokens.
    """

    size: int = 32
    channels: tuple[int, ...] = (16, 32, 64)
    layers: int = 1
    heads: int = 4
    embedding: int = 128
    text_channels: int = 64
    text_layers: int = 2
    tokens: int = 16


def build_tokenizer(captions: Iterable[str], tokens: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make each word of the captions one token.

    Other words still encode: they are spelled in smaller pieces, down to bytes.
    """
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
    words += [word for word in sorted(learned, key=learned.__getitem__) if word not in set(words)]
    vocabulary = {word: index for index, word in enumerate([*words, _START, _END])}
    merges = _merges_of(learner)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges that were learnt, best first; only the serialized form tells them."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_pipeline(config: ModelConfig, captions: Iterable[str]) -> TextToViewPipeline:
    """The untrained pipeline, drawn from torch's global generator.

    The model predicts the velocity `sqrt(abar) noise - sqrt(1 - abar) view`: where the noise is strong, a model
    this small cannot copy the noise through well enough for what remains of its guess to be of use.

    Args:
        config: Sizes.
        captions: What the tokenizer learns its words from.
    """
    tokenizer = build_tokenizer(captions, config.tokens)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_channels,
            intermediate_size=2 * config.text_channels,
            projection_dim=config.text_channels,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    plain = len(config.channels) - 1
    unet = UNet2DConditionModel(
        sample_size=config.size,
        in_channels=3,
        out_channels=3,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        cross_attention_dim=config.text_channels,
        attention_head_dim=config.heads,  # diffusers' name for the number of heads
        norm_num_groups=8,
        time_embedding_dim=config.embedding,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=CONDITION_SIZE,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return TextToViewPipeline(unet, text_encoder, tokenizer, scheduler)


def save_half_precision(pipeline: TextToViewPipeline, folder: Path) -> None:
    """Save a pipeline folder with fp16 safetensors weights; the pipeline itself is left as it was."""
    halves = {}
    for name in ("unet", "text_encoder"):
        part = getattr(pipeline, name)
        half = (
            type(part)(part.config)
            if name == "text_encoder"
            else type(part).from_config(part.config)
        )
        half.load_state_dict(part.state_dict())
        halves[name] = half.to(torch.float16)
    TextToViewPipeline(
        **halves, tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler
    ).save_pretrained(folder, safe_serialization=True)
