"""A small pixel-space diffusion pipeline: a caption and a camera in, a view out.

It saves and loads folders in the ordinary diffusers layout (`model_index.json`, `unet/`, `text_encoder/`, `tokenizer/`,
`scheduler/`), and every component is a stock class of diffusers or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from picardopt_3d.cameras import Cameras
from picardopt_3d.compat import CLIPTokenizer
from picardopt_3d.guidance.text_context import TextContext


class TextToViewPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples views that match captions, from given cameras.

    Args:
        unet: The score model, in pixel space; the camera goes in as class labels (`class_embed_type="projection"`).
        text_encoder: Embeds captions for the cross-attention.
        tokenizer: The tokenizer of the text encoder.
        scheduler: The noise schedule.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    # Set by `register_modules`; the annotations of diffusers and transformers do not describe these classes.
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeds captions.

        Args:
            prompts: Captions, `[batch]`; the empty one stands for no caption.

        Returns:
            Their embeddings, `[batch, tokens, channels]`.
        """
        return encode_prompts(self.text_encoder, self.tokenizer, prompts)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        cameras: Cameras,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples one view per camera.

        Args:
            prompts: One caption per camera.
            cameras: The cameras of the views.
            guidance_scale: `s` of `uncond + s (cond - uncond)`, over the caption; both have the camera.
            num_inference_steps: Denoising steps.
            generator: Source of the noise.

        Returns:
            Views, RGB in [0, 1], `[batch, 3, height, width]`.
        """
        count, size = len(cameras), self.unet.config.sample_size
        embeddings = self.encode([*prompts, *[""] * count])  # [2 batch, tokens, channels]
        conditions = cameras.condition().to(embeddings).repeat(2, 1)
        views = torch.randn(count, 3, size, size, generator=generator).to(embeddings)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(views.repeat(2, 1, 1, 1), timestep)
            predicted = self.unet(
                scaled, timestep, encoder_hidden_states=embeddings, class_labels=conditions
            ).sample
            conditional, unconditional = predicted.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            views = self.scheduler.step(guided, timestep, views, generator=generator).prev_sample
        return (views / 2 + 0.5).clamp(0, 1)


def encode_prompts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Returns the hidden states of captions, padded or cut to the encoder's length, `[batch, tokens, channels]`."""
    tokens = TextContext(tokenizer, tokenizer.model_max_length).tokenize(prompts).input_ids
    states: Tensor = text_encoder(tokens.to(text_encoder.device)).last_hidden_state
    return states
