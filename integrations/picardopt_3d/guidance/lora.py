"""The LoRA of variational score distillation, on a UNet of diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig
from torch import Tensor, nn

POSE_SIZE = 16
"""Numbers of a camera-to-world matrix, which the LoRA is told."""


class PoseEmbedding(TimestepEmbedding):  # type: ignore[misc]
    """Embeds poses in its own precision, whatever the UNet computes in."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embeds poses. [batch, POSE_SIZE] to [batch, channels]."""
        embedding: Tensor = super().forward(sample.to(self.linear_1.weight.dtype), condition)
        return embedding


def add_lora(unet: Any, rank: int) -> dict[str, nn.Parameter]:
    """Puts a LoRA on a UNet's attention and, if it takes no class labels, an embedding of 16 numbers of a camera.

    Args:
        unet: A `UNet2DConditionModel`, frozen. Its other weights stay as they are.
        rank: The LoRA's rank, and its alpha.

    Returns:
        What is to be trained, by name, in float32.

    Raises:
        ValueError: It has a LoRA already.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError(
            "the unet carries a LoRA already: load the model again for a second VSD guidance"
        )
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    parameters = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    if unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = PoseEmbedding(POSE_SIZE, width).to(unet.device)
        for name, parameter in unet.class_embedding.named_parameters():
            parameters[f"class_embedding.{name}"] = parameter
    for (
        parameter
    ) in parameters.values():  # beside half-precision weights too: AdamW's steps are small
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters
