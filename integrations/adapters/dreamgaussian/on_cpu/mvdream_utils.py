"""Stands for DreamGaussian's guidance/mvdream_utils.py: the model that ships with picardopt-3d, which sees cameras."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from torch import Tensor, nn

FIELD_OF_VIEW = 42.5
"""Degrees: what the configuration of the trial says."""


class MVDream(nn.Module):
    """Score distillation of four views at right angles."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.score = PixelDiffusion.from_pretrained()
        self.levels = len(self.score.alphas_cumprod)

    def get_text_embeds(self, prompts: list[str], negative_prompts: list[str]) -> None:
        """Encodes the prompt."""
        self.prompt = self.score.encode(prompts[0])

    def train_step(
        self, images: Tensor, poses: Tensor, step_ratio: float | None, guidance_scale: float = 3.0
    ) -> Tensor:
        """Returns the loss of score distillation, with the noise level that falls with the step.

        Args:
            images: RGB in [0, 1]. [views, 3, height, width]
            poses: Camera to world, y up. [views, 4, 4]
            step_ratio: Share of the run that is over; None draws the noise level.
            guidance_scale: Of classifier-free guidance.
        """
        x, y, z = poses[:, :3, 3].float().unbind(1)
        distance = poses[:, :3, 3].float().norm(dim=1)
        elevation = torch.rad2deg(torch.asin(y / distance))
        cameras = orbit_cameras(
            elevation, torch.rad2deg(torch.atan2(x, z)), distance, FIELD_OF_VIEW
        )
        clean = self.score.to_model_space(images)
        if step_ratio is None:
            levels = torch.randint(20, 981, (len(images),))
        else:
            level = int(np.clip(round((1 - step_ratio) * self.levels), 20, 980))
            levels = torch.full((len(images),), level)
        alphas = self.score.alphas_cumprod[levels].view(-1, 1, 1, 1)
        with torch.no_grad():
            noise = torch.randn_like(clean)
            noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
            with_text, without, *_ = self.score.predict_noise(noisy, levels, self.prompt, cameras)
            predicted = without + guidance_scale * (with_text - without)
            target = clean - (1 - alphas) * (predicted - noise)
        return 0.5 * F.mse_loss(clean, target, reduction="sum") / len(images)
