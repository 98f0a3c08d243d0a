"""Small random pipelines of the very classes that published models have, saved as the hub has them."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from packaging.version import Version
from picardopt_3d.compat import CLIPImageProcessorPil, CLIPTokenizer, T5Tokenizer
from picardopt_3d.guidance.zero123_pipeline import CLIPCameraProjection, Zero123Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5")
"""Whose tokenizers are not made of lists."""


def clip_tokenizer(tokens: int = 16) -> CLIPTokenizer:
    """Knows the printable characters, and the merges that make "red" a word."""
    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    merges = [("r", "e"), ("re", "d</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    if OLD_TRANSFORMERS:
        with tempfile.TemporaryDirectory() as folder:
            names = [str(Path(folder, name)) for name in ("vocab.json", "merges.txt")]
            Path(names[0]).write_text(json.dumps(vocabulary))
            lines = ["#version: 0.2", *map(" ".join, merges), ""]
            Path(names[1]).write_text("\n".join(lines))
            old: Any = CLIPTokenizer
            return old(*names, model_max_length=tokens)
    pairs: Any = merges  # the signature promises less than the class takes
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=tokens)


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def vae(size: int = 16) -> AutoencoderKL:
    """Between [3, size, size] and [4, size / 2, size / 2]."""
    return AutoencoderKL(
        sample_size=size,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.18215,
    )


def latent_unet(in_channels: int = 4, size: int = 8, width: int = WIDTH) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def save_stable_diffusion(
    folder: Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    variant: str | None = None,
    tokens: int = 32,
) -> Path:
    """A `StableDiffusionPipeline` of 16 pixels; 2.1 predicts "v_prediction", the others "epsilon"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tokens)
        pipeline = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=latent_unet(),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                steps_offset=1,
                set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, variant=variant)
    return folder


def save_both_predictions(root: Path) -> dict[str, Path]:
    """Two different Stable Diffusions, by what they predict."""
    return {
        "epsilon": save_stable_diffusion(root / "epsilon", seed=0),
        "v_prediction": save_stable_diffusion(root / "velocity", "v_prediction", seed=1),
    }


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581red", -1.0)]
    pieces += [(letter, -3.0) for letter in [*string.ascii_lowercase, *string.digits, ",", "."]]
    if OLD_TRANSFORMERS:
        learned = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
        learned.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        learned.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        old: Any = T5Tokenizer
        return old(tokenizer_object=learned, extra_ids=0, model_max_length=77)
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def save_deepfloyd(folder: Path, seed: int = 0) -> Path:
    """An `IFPipeline` of 16 pixels: T5, the variance learned beside the noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=WIDTH,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,  # its group norm has 32 groups
            encoder_hid_dim=WIDTH,
            attention_head_dim=4,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            norm_num_groups=4,
        )
        pipeline = IFPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=DDPMScheduler(
                beta_schedule="squaredcos_cap_v2",
                prediction_type="epsilon",
                variance_type="learned_range",
                thresholding=True,
                dynamic_thresholding_ratio=0.95,
                sample_max_value=1.5,
            ),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_zero123(folder: Path, prediction_type: str = "epsilon", width: int = WIDTH) -> Path:
    """A random model of 16 pixels, as the shipped one is saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        unet = latent_unet(in_channels=8, width=width)
        pipeline = Zero123Pipeline(
            vae(),
            CLIPVisionModelWithProjection(vision),
            unet,
            DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                steps_offset=1,
                set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
            CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False),
            CLIPCameraProjection(width),
        )
    pipeline.save_pretrained(folder)
    return folder
