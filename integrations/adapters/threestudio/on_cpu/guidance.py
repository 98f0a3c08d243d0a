"""Stands for Stable Diffusion in threestudio: the model that ships with picardopt-3d, which sees cameras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from threestudio.utils.base import BaseObject
from threestudio.utils.misc import C
from torch import Tensor


@threestudio.register("shipped-prompt-processor")
class ShippedPromptProcessor(BaseObject):
    """Hands the prompt on."""

    @dataclass
    class Config(BaseObject.Config):
        """What is wanted; the model that the configuration names is not loaded."""

        prompt: str = "a blue chair"
        pretrained_model_name_or_path: str = ""

    def __call__(self) -> str:
        """Returns the prompt."""
        prompt: str = self.cfg.prompt
        return prompt


@threestudio.register("shipped-guidance")
class ShippedGuidance(BaseObject):
    """Score distillation; the range of noise levels follows the step, as that of threestudio's own guidance does."""

    @dataclass
    class Config(BaseObject.Config):
        """Options, by the names of threestudio's guidance; the model that the configuration names is not loaded."""

        pretrained_model_name_or_path: str = ""
        weighting_strategy: str = "sds"
        guidance_scale: float = 3.0
        min_step_percent: Any = 0.02
        max_step_percent: Any = 0.98

    def configure(self) -> None:
        """Loads the model."""
        self.score = PixelDiffusion.from_pretrained()
        self.levels = len(self.score.alphas_cumprod)

    def __call__(
        self,
        rgb: Tensor,
        prompt: str,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        fovy: Tensor,
        **others: Any,
    ) -> dict[str, Any]:
        """Returns the loss on views [batch, height, width, 3]."""
        cameras = orbit_cameras(elevation, azimuth, camera_distances, torch.rad2deg(fovy))
        clean = self.score.to_model_space(rgb.permute(0, 3, 1, 2))
        levels = torch.randint(self.min_step, self.max_step + 1, (len(rgb),))
        alphas = self.score.alphas_cumprod[levels].view(-1, 1, 1, 1)
        with torch.no_grad():
            noise = torch.randn_like(clean)
            noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
            encoded = self.score.encode(prompt)
            with_text, without, *_ = self.score.predict_noise(noisy, levels, encoded, cameras)
            predicted = without + self.cfg.guidance_scale * (with_text - without)
            gradient = (1 - alphas) * (predicted - noise)
            target = clean - gradient
        loss = 0.5 * F.mse_loss(clean, target, reduction="sum") / len(rgb)
        return {"loss_sds": loss, "grad_norm": gradient.norm(), "max_step": self.max_step}

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Sets the range of noise levels."""
        low, high = self.cfg.min_step_percent, self.cfg.max_step_percent
        self.min_step = int(self.levels * C(low, epoch, global_step))
        self.max_step = int(self.levels * C(high, epoch, global_step))
