"""Guidance of published size: random weights in the very classes, without text encoders.

The configurations are those of the published models: Stable Diffusion 2.1 base (866 million parameters in its UNet) and
2.1, DeepFloyd IF-I-XL (4.3 thousand million) and Zero-1-to-3 XL (860 million, with CLIP ViT-L/14 for the picture).
Embeddings of texts are random, as a text encoder is in memory only while a run begins. With `tiny` all are small.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from picardopt_3d.guidance import Guidance, ScoreDistillation
from picardopt_3d.guidance.deepfloyd import DeepFloyd
from picardopt_3d.guidance.denoise import Denoising
from picardopt_3d.guidance.embeddings import Encode, TextEmbeddings
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.stable_diffusion import SHIPPED, StableDiffusion
from picardopt_3d.guidance.text_context import TextContext
from picardopt_3d.guidance.vsd import VSD
from picardopt_3d.guidance.zero123 import Zero123
from picardopt_3d.guidance.zero123_pipeline import CLIPCameraProjection, Zero123Pipeline
from picardopt_3d.methods import StageConfig
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TOKENS = 77
_FILLERS = (
    *("constant_", "eye_", "normal_", "ones_", "trunc_normal_", "uniform_", "zeros_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
)

STABLE_DIFFUSION: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
ZERO123: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
DEEPFLOYD: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *3 * ("SimpleCrossAttnDownBlock2D",)),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*3 * ("SimpleCrossAttnUpBlock2D",), "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 2816,
    "encoder_hid_dim": 4096,
    "attention_head_dim": 64,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "act_fn": "gelu",
}
AUTOENCODER: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": 4 * ("DownEncoderBlock2D",),
    "up_block_types": 4 * ("UpDecoderBlock2D",),
    "layers_per_block": 2,
    "latent_channels": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}
_TINY = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 8}
_TINY_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


def full_size_guidance(stage: StageConfig, device: torch.device, tiny: bool) -> Guidance:
    """The guidance of a stage, with its own loss, options and precision; in float32 if tiny."""
    options = replace(stage.guidance.options, embeddings=None)
    if tiny:
        options = replace(options, dtype="float32")
    build = {
        "stable-diffusion": _stable_diffusion,
        "deepfloyd": _deepfloyd,
        "zero123": _zero123,
    }[stage.guidance.model]
    score: Any = build(device, options, tiny)
    if stage.guidance.loss == "denoise":
        return Denoising(score, stage.denoise)
    if stage.guidance.loss != "vsd":
        return ScoreDistillation(score, stage.sds)
    if stage.guidance.lora_source is None:
        return VSD(score, stage.vsd)
    own = {"sample_size": 96} if not tiny else {}
    unet = build_unet(STABLE_DIFFUSION | own, device, options, tiny)
    scheduler = _latent_schedule("v_prediction")
    beside = StableDiffusion(unet, score.vae, scheduler, score._texts, device, options)
    return VSD(score, stage.vsd, beside)


def _stable_diffusion(device: torch.device, options: ModelOptions, tiny: bool) -> StableDiffusion:
    unet = build_unet(STABLE_DIFFUSION, device, options, tiny)
    texts = _texts(unet.config.cross_attention_dim, device)
    vae = _autoencoder(device, options, tiny)
    return StableDiffusion(unet, vae, _latent_schedule("epsilon"), texts, device, options)


def _deepfloyd(device: torch.device, options: ModelOptions, tiny: bool) -> DeepFloyd:
    unet = build_unet(DEEPFLOYD, device, options, tiny)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    texts = _texts(unet.config.encoder_hid_dim, device)
    return DeepFloyd(unet, scheduler, texts, device, options)


def _zero123(device: torch.device, options: ModelOptions, tiny: bool) -> Zero123:
    unet = build_unet(ZERO123, device, options, tiny)
    width = unet.config.cross_attention_dim
    vision = VISION | {"projection_dim": width} | (_TINY_VISION if tiny else {})
    config = CLIPVisionConfig(**vision)
    pipeline = Zero123Pipeline(
        vae=_autoencoder(device, options, tiny),
        image_encoder=_filled(lambda: CLIPVisionModelWithProjection(config), device, options),
        unet=unet,
        scheduler=_latent_schedule("epsilon"),
        feature_extractor=CLIPImageProcessorPil(),
        clip_camera_projection=_filled(lambda: CLIPCameraProjection(width), device, options),
    )
    return Zero123(pipeline, device, options)


def build_unet(
    config: dict[str, Any], device: torch.device, options: ModelOptions, tiny: bool
) -> UNet2DConditionModel:
    if tiny:
        config = config | _TINY | {"sample_size": 16 if "act_fn" in config else 4}
        config |= {"cross_attention_dim": 64}
        config |= {"encoder_hid_dim": 64} if "encoder_hid_dim" in config else {}
        config |= {"addition_embed_type_num_heads": 2} if "act_fn" in config else {}
    return _filled(lambda: UNet2DConditionModel(**config), device, options)


def _autoencoder(device: torch.device, options: ModelOptions, tiny: bool) -> AutoencoderKL:
    config = AUTOENCODER | ({"block_out_channels": (32, 32, 32, 32)} if tiny else {})
    return _filled(lambda: AutoencoderKL(**config), device, options)


def _latent_schedule(prediction: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
    )


def _texts(width: int, device: torch.device) -> TextEmbeddings:
    """Random embeddings of any text, of the width that a text encoder of that model has."""
    generator = torch.Generator().manual_seed(0)

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.randn(len(texts), TOKENS, width, generator=generator)

    def load() -> Encode:
        return encode

    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    return TextEmbeddings(load, "random", None, device, TextContext(tokenizer, TOKENS))


def _filled(build: Callable[[], Any], device: torch.device, options: ModelOptions) -> Any:
    """A model that is built where and as it is used, with random weights that keep numbers finite."""
    with _without_fillers(), torch.device(device), _default(options.torch_dtype):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _fill(module, name, parameter)
    return model


@torch.no_grad()
def _fill(module: nn.Module, name: str, parameter: Tensor) -> None:
    if parameter.ndim > 1:
        parameter.normal_(0.0, 0.5 / math.sqrt(parameter[0].numel()))
    else:
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm) and name == "weight"
        parameter.fill_(1.0 if norm else 0.0)


@contextlib.contextmanager
def _without_fillers() -> Iterator[None]:
    """Leaves out the slow first values that layers give their own weights."""

    def left(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    with contextlib.ExitStack() as stack:
        for name in _FILLERS:
            stack.enter_context(mock.patch.object(nn.init, name, left))
        yield


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
