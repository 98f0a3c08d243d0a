"""What the trainings of the diffusion models share: the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def velocity_loss(
    unet: Any,
    scheduler: Any,
    clean: Tensor,
    generator: torch.Generator,
    beside: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """Returns the squared error of the predicted velocity, at times spread evenly over the batch.

    The velocity is `sqrt(abar) noise - sqrt(1 - abar) clean`: where the noise is strong, a model this small cannot
    copy the noise through well enough for what remains of its guess to be of use.

    Args:
        unet: The score model.
        scheduler: Its noise levels.
        clean: What is noised, `[batch, channels, height, width]`.
        generator: For the times and the noise.
        beside: Channels that go in behind the noisy ones, as they are.
        conditions: Whatever else the model takes.
    """
    batch, count, device = len(clean), len(scheduler.alphas_cumprod), clean.device
    spread = torch.rand(batch, generator=generator, device=device)
    spread = (spread + torch.arange(batch, device=device)) / batch
    timesteps = (spread * count).long().clamp(max=count - 1)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    inputs = noisy if beside is None else torch.cat([noisy, beside], dim=1)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    predicted = unet(inputs, timesteps, **conditions).sample
    return torch.nn.functional.mse_loss(predicted.float(), target)
