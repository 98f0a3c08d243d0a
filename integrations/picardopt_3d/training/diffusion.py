"""The loss that the trainings of the diffusion models share."""

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
    """Returns the squared error of the predicted velocity, at noise levels spread evenly over the batch.

    The velocity is `sqrt(abar) noise - sqrt(1 - abar) clean`. It suits small models better than the noise: at high
    noise levels they cannot reproduce the noise precisely enough to leave a useful guess of the clean view.

    Args:
        unet: The score model.
        scheduler: The noise schedule.
        clean: Clean views, `[batch, channels, height, width]`.
        generator: Source of the noise levels and the noise.
        beside: Further input channels without noise, `[batch, channels, height, width]`.
        conditions: Other arguments of the model.
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
