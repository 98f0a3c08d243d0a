"""The LoRA of variational score distillation, on a UNet of diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig
from torch import Tensor, nn

POSE_SIZE = 16
"""Numbers of a camera-to-world matrix, which conditions the LoRA."""


class PoseEmbedding(TimestepEmbedding):  # type: ignore[misc]
    """Embeds poses in its own precision, independent of the UNet's."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embeds poses `[batch, POSE_SIZE]` as `[batch, channels]`."""
        embedding: Tensor = super().forward(sample.to(self.linear_1.weight.dtype), condition)
        return embedding


def add_lora(unet: Any, rank: int) -> dict[str, nn.Parameter]:
    """Adds a LoRA to a UNet's attention and, if the UNet takes no class labels, an embedding of the camera's pose.

    Args:
        unet: A frozen `UNet2DConditionModel`. Its other weights stay as they are.
        rank: Rank and alpha of the LoRA.

    Returns:
        The parameters to train, by name, in float32.

    Raises:
        ValueError: The UNet has a LoRA already.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError("unet has a LoRA already: load the model again for a second VSD guidance")
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
    ) in parameters.values():  # float32 even beside half-precision weights: AdamW's steps are small
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters
