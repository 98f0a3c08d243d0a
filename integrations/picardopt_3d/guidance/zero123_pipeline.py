"""The pipeline of Zero-1-to-3 (arXiv 2303.11328): an image and a relative pose in, the view from that pose out.

The folder has the parts and names of the community's checkpoints in diffusers format (`vae/`, `unet/`,
`image_encoder/`, `clip_camera_projection/`, `feature_extractor/`, `scheduler/`); all but the projection are stock
classes. The UNet takes the noisy latent, followed by the reference's latent (its mode, not scaled), and attends to one
token: the projection of the reference's CLIP embedding and the relative pose. Without conditioning both are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from picardopt_3d.compat import CLIPImageProcessorPil


class CLIPCameraProjection(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A linear layer from a CLIP embedding and a relative pose to the token that the UNet attends to.

    Class, parameter and option names are those of the published checkpoints.

    Args:
        embedding_dim: Length of the CLIP embedding and of the token.
        additional_embeddings: Length of the pose.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, embedding_dim: int = 768, additional_embeddings: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding_dim + additional_embeddings, embedding_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Projects embedding and pose, `[..., embedding_dim + additional_embeddings]`, to `[..., embedding_dim]`."""
        token: Tensor = self.proj(embedding)
        return token


class CCProjection(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The same linear layer with the names of diffusers' community pipeline (`kxic/zero123-xl`).

    Args:
        in_channel: Length of the CLIP embedding plus that of the pose.
        out_channel: Length of the token.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, in_channel: int = 772, out_channel: int = 768) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channel, out_channel)

    def forward(self, embedding: Tensor) -> Tensor:
        """Projects embedding and pose, `[..., in_channel]`, to `[..., out_channel]`."""
        token: Tensor = self.projection(embedding)
        return token


PROJECTIONS = {"clip_camera_projection": CLIPCameraProjection, "cc_projection": CCProjection}
"""Class of the linear layer by its folder in the two published layouts."""


class Zero123Pipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples views of the object in an image.

    Args:
        vae: Autoencoder between pixels and latents.
        image_encoder: Embeds the reference image.
        unet: The score model, in latent space, with twice the latent's channels as input.
        scheduler: The noise schedule.
        feature_extractor: The image encoder's processor, with size, mean and deviation of its pixels.
        clip_camera_projection: Projects embedding and pose to the token.
    """

    model_cpu_offload_seq = "image_encoder->clip_camera_projection->unet->vae"
    # Set by `register_modules`.
    vae: Any
    image_encoder: Any
    unet: Any
    scheduler: Any
    feature_extractor: Any
    clip_camera_projection: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        feature_extractor: CLIPImageProcessorPil,
        clip_camera_projection: CLIPCameraProjection,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            clip_camera_projection=clip_camera_projection,
        )

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        poses: Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples one view per image and pose.

        Args:
            images: The references, RGB in [0, 1], `[batch, 3, height, width]`.
            poses: From `relative_pose`, `[batch, 4]`.
            guidance_scale: `s` of `uncond + s (cond - uncond)`, over image and pose.
            num_inference_steps: Denoising steps.
            generator: Source of the noise.

        Returns:
            Views, RGB in [0, 1], `[batch, 3, height, width]`.
        """
        count = len(images)
        images, poses = images.to(self.unet.device), poses.to(self.unet.device)
        embedding = embed_image(self.image_encoder, self.feature_extractor, images)
        attended = self.clip_camera_projection(torch.cat([embedding, poses], dim=-1))[:, None]
        beside = self.vae.encode(2 * images - 1).latent_dist.mode()
        attended, beside = (torch.cat([x, torch.zeros_like(x)]) for x in (attended, beside))
        noise = torch.randn(beside[:count].shape, generator=generator).to(beside)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = noise * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), timestep)
            predicted = self.unet(
                torch.cat([scaled, beside], dim=1), timestep, encoder_hidden_states=attended
            ).sample
            conditional, unconditional = predicted.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(guided, timestep, latents).prev_sample
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        views: Tensor = (decoded / 2 + 0.5).clamp(0, 1)
        return views


def relative_pose(reference: Tensor, target: Tensor) -> Tensor:
    """Returns the pose from the reference to the target, as Zero-1-to-3 takes it.

    Args:
        reference: Elevation and azimuth in degrees, and distance, `[batch, 3]` or `[3]`.
        target: The same for the target, `[batch, 3]`.

    Returns:
        Difference of the polar angles (radians, measured from the pole), sine and cosine of the difference of the
        azimuths, and difference of the distances, `[batch, 4]`.
    """
    polar = torch.deg2rad(reference[..., 0] - target[..., 0])
    around = torch.deg2rad(target[..., 1] - reference[..., 1])
    away = target[..., 2] - reference[..., 2]
    return torch.stack(torch.broadcast_tensors(polar, around.sin(), around.cos(), away), dim=-1)


def embed_image(image_encoder: Any, feature_extractor: Any, images: Tensor) -> Tensor:
    """Returns CLIP embeddings of RGB images in [0, 1], resized on their device, `[batch, embedding]`."""
    size = image_encoder.config.image_size
    images = images.float()  # a CPU cannot resize in half precision
    if images.shape[-2:] != (size, size):
        images = functional.interpolate(
            images, (size, size), mode="bicubic", align_corners=False, antialias=True
        )
    expected = zip(feature_extractor.image_mean, feature_extractor.image_std, strict=True)
    # Numbers, not tensors, which would have to be copied to the device.
    channels = [(images[:, i] - mean) / std for i, (mean, std) in enumerate(expected)]
    pixels = torch.stack(channels, dim=1).to(image_encoder.dtype)
    embeddings: Tensor = image_encoder(pixels).image_embeds
    return embeddings
