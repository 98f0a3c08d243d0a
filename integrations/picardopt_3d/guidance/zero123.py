"""Zero-1-to-3 as a score model: views of the object in a picture from other cameras.

The UNet has two conditions for each view: a token, which a linear layer computes from the picture's CLIP embedding and
the relative pose, and the picture's latent, concatenated to the noisy one. Without conditioning both are zero.
Classifier-free guidance is `uncond + s (cond - uncond)` (`SdsConfig(guidance_form="uncond")`) in the paper, the
pipeline and every released configuration.

The relative pose is that of the published training code: the target's polar angle minus the picture's (radians, from
the pole down, so that it is negative for a higher camera), sine and cosine of the target's azimuth minus the picture's
(counterclockwise about z seen from above, as `Cameras.azimuth`), and the target's distance minus the picture's. Stable
Zero123 takes the picture's own polar angle (radians) instead of the distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from picardopt_3d.cameras import Cameras
from picardopt_3d.compat import CLIPImageProcessorPil
from picardopt_3d.guidance.diffusion import as_noise
from picardopt_3d.guidance.loading import (
    ModelOptions,
    load_part,
    memory_explained,
    place,
    read_index,
)
from picardopt_3d.guidance.protocol import (
    Encoded,
    EncodedImage,
    Prediction,
    pixels_to_model_space,
)
from picardopt_3d.guidance.stable_diffusion import decode_latents, draw_latents
from picardopt_3d.guidance.zero123_pipeline import (
    PROJECTIONS,
    Zero123Pipeline,
    embed_image,
    relative_pose,
)
from picardopt_3d.models import GUIDANCE_MODELS, WEIGHTS
from picardopt_3d.prompts import ImagePrompt, TextPrompt

SHIPPED = WEIGHTS / "zero123"
"""Folder of the model that ships with the package."""

Pose = Literal["distance", "polar"]

_CLASSES = GUIDANCE_MODELS["zero123"].classes


class Zero123:
    """The score of a Zero-1-to-3 model; a `JoinableScore` whose prompt is a picture (`ImagePrompt`).

    Args:
        pipeline: The loaded parts; their weights are frozen.
        device: Device of the model.
        options: How the model is run.
        pose: The last number of the pose: "distance", or "polar" for Stable Zero123.

    Raises:
        ValueError: The pose is unknown, or the UNet has no channels for the picture's latent.
    """

    def __init__(
        self,
        pipeline: Zero123Pipeline,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
        pose: Pose = "distance",
    ) -> None:
        if pose not in get_args(Pose):
            raise ValueError(f"pose={pose!r}: give one of {', '.join(get_args(Pose))}")
        _check_unet(pipeline.unet, pipeline.vae)
        self.pipeline, self.pose, self.device = pipeline, pose, torch.device(device)
        self.options = options or ModelOptions()
        self.joined_views = self.options.joined_views
        for name in ("vae", "unet", "image_encoder", "clip_camera_projection"):
            part = getattr(pipeline, name).requires_grad_(False).eval()
            if name != "unet":
                part.to(self.device)
        self.vae, self.unet = pipeline.vae, pipeline.unet
        if self.options.channels_last:
            self.vae.to(memory_format=torch.channels_last)
        if self.options.vae_slicing:
            self.vae.enable_slicing()
        self._release = place(self.unet, self.device, self.options)
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side: int = self.unet.config.sample_size
        self.size = side * shrink
        self.space: tuple[int, int, int] = (self.vae.config.latent_channels, side, side)
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.float()
        self.prediction_type: str = pipeline.scheduler.config.prediction_type

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SHIPPED,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
        pose: Pose | None = None,
    ) -> Zero123:
        """Loads a folder or a model of the Hugging Face hub, in any of the published layouts.

        The parts are loaded one by one, because published indices name pipeline classes that no library has. No code
        from the folder is run.

        Args:
            source: A folder in diffusers' layout, or a hub id such as "ashawkey/zero123-xl-diffusers",
                "ashawkey/stable-zero123-diffusers" or "kxic/zero123-xl"; by default the shipped model.
            device: Device of the model.
            options: How the model is loaded and run.
            pose: As in the class; None: "polar" if the source's name contains "stable", else "distance".

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            PermissionError: The model is gated.
            ValueError: The model is of another kind.
        """
        options = options or ModelOptions()
        index = read_index(source, _CLASSES, options)
        layer = next((name for name in PROJECTIONS if name in index), None)
        if layer is None:
            raise ValueError(
                f"source={str(source)!r} has no projection of the camera ({' or '.join(PROJECTIONS)}): give a "
                f"Zero-1-to-3 model"
            )
        pipeline = Zero123Pipeline(
            vae=load_part(AutoencoderKL, source, "vae", options),
            image_encoder=load_part(
                CLIPVisionModelWithProjection, source, "image_encoder", options
            ),
            unet=load_part(UNet2DConditionModel, source, "unet", options),
            scheduler=load_part(DDIMScheduler, source, "scheduler", options),
            feature_extractor=load_part(
                CLIPImageProcessorPil, source, "feature_extractor", options
            ),
            clip_camera_projection=load_part(PROJECTIONS[layer], source, layer, options),
        )
        if pose is None:
            pose = "polar" if "stable" in Path(source).name.lower() else "distance"
        return cls(pipeline, device, options, pose)

    @torch.no_grad()
    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedImage:
        """Encodes a picture as its CLIP embedding and the unscaled mode of its latent.

        Raises:
            TypeError: The prompt is not a picture.
        """
        if not isinstance(prompt, ImagePrompt):
            raise TypeError(
                f"prompt of type {type(prompt).__name__}: Zero123 takes a picture, ImagePrompt(image, camera); "
                f"texts are for the other models"
            )
        image, encoder = prompt.image[None].to(self.device), self.pipeline.image_encoder
        seen = pixels_to_model_space(image, self.size).clamp(-1, 1)
        with memory_explained(self.options):
            embedding = embed_image(encoder, self.pipeline.feature_extractor, image)
            latent = self.vae.encode(seen.to(self.vae.dtype)).latent_dist.mode()
        return EncodedImage(prompt, embedding.float(), latent.float())

    def draw(self, batch: int) -> Tensor | None:
        """Draws the noise of latents, `[batch, channels, height, width]`."""
        return torch.randn(batch, *self.space)

    def to_model_space(self, views: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Draws scaled latents from the VAE's posterior; gradients flow back through the VAE.

        Args:
            views: RGB in [0, 1], `[batch, 3, height, width]`.
            drawn: The latents' noise, from `draw`; None: it is drawn here.

        Returns:
            The latents, float32, `[batch, channels, height, width]`.
        """
        return draw_latents(self.vae, pixels_to_model_space(views, self.size), self.options, drawn)

    def to_views(self, clean: Tensor) -> Tensor:
        """Decodes scaled latents, `[batch, channels, ...]`, to RGB in [0, 1], `[batch, 3, size, size]`."""
        return decode_latents(self.vae, clean, self.options)

    @torch.no_grad()
    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """Predicts the noise with and without the picture, in one pass of twice the batch.

        Args:
            noisy: Scaled latents with noise, `[batch, channels, height, width]`.
            timesteps: Integer noise levels, `[batch]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
        """
        if not isinstance(prompt, EncodedImage):
            raise TypeError(
                f"prompt of type {type(prompt).__name__}: give what this model's own `encode` returned for a picture"
            )
        token, beside = self.conditions(prompt, cameras)
        twice, dtype = noisy.repeat(2, 1, 1, 1), self.unet.dtype
        given = torch.cat([twice, torch.cat([beside, torch.zeros_like(beside)])], dim=1).to(dtype)
        if self.options.channels_last:
            given = given.contiguous(memory_format=torch.channels_last)
        with memory_explained(self.options):
            predicted = self.unet(
                given,
                timesteps.repeat(2),
                encoder_hidden_states=torch.cat([token, torch.zeros_like(token)]).to(dtype),
            ).sample.float()
        self._release()
        abar = self.alphas_cumprod.to(noisy)[timesteps.repeat(2)][:, None, None, None]
        noise = as_noise(predicted, twice, abar, self.prediction_type)
        return Prediction(*noise.contiguous().chunk(2))

    @torch.no_grad()
    def conditions(self, prompt: EncodedImage, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Returns the UNet's conditions for each view.

        Args:
            prompt: From `encode`.
            cameras: The cameras of the views.

        Returns:
            The token, `[batch, 1, channels]`, and the picture's latent, `[batch, channels, height, width]`.
        """
        layer, batch = self.pipeline.clip_camera_projection, len(cameras)
        pose = self.relative_pose(prompt.prompt.camera, cameras).to(prompt.embedding)
        joined = torch.cat([prompt.embedding.expand(batch, -1), pose], dim=-1)
        return layer(joined.to(layer.dtype))[:, None].float(), prompt.latent.expand(
            batch, -1, -1, -1
        )

    def relative_pose(self, reference: Cameras, cameras: Cameras) -> Tensor:
        """Returns the pose from a picture's camera to each view's, as this model takes it, `[batch, 4]`."""
        reference = reference.to(cameras.azimuth.device)
        pose = relative_pose(_angles(reference), _angles(cameras))
        if self.pose == "polar":
            pose[:, 3] = torch.deg2rad(90 - reference.elevation)
        return pose

    def sample(
        self,
        prompt: ImagePrompt,
        cameras: Cameras,
        guidance_scale: float = 3.0,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples views of the object in a picture with the pipeline.

        Args:
            prompt: The picture.
            cameras: The cameras of the views.
            guidance_scale: `s` of `uncond + s (cond - uncond)`.
            steps: Denoising steps.
            generator: Source of the noise, on the CPU.

        Returns:
            Views, RGB in [0, 1], `[batch, 3, size, size]`.

        Raises:
            ValueError: The model is offloaded.
        """
        if self.options.offload != "none":
            raise ValueError(
                f"offload={self.options.offload!r}: sampling needs the model on its device; load it without offload"
            )
        image = (pixels_to_model_space(prompt.image[None], self.size) / 2 + 0.5).clamp(0, 1)
        return self.pipeline(
            image.expand(len(cameras), -1, -1, -1).to(self.unet.dtype),
            self.relative_pose(prompt.camera, cameras).to(self.unet.dtype),
            guidance_scale,
            steps,
            generator,
        )


def _angles(cameras: Cameras) -> Tensor:
    """Returns elevation and azimuth (degrees) and distance, `[batch, 3]`."""
    return torch.stack([cameras.elevation, cameras.azimuth, cameras.distance], dim=-1)


def _check_unet(unet: Any, vae: Any) -> None:
    """Checks that the UNet has input channels for the picture's latent beside the noisy one.

    Raises:
        ValueError: It does not.
    """
    channels, taken = vae.config.latent_channels, unet.config.in_channels
    if taken != 2 * channels:
        raise ValueError(
            f"unet takes {taken} channels and vae makes {channels}: give a Zero-1-to-3 model, whose unet takes "
            f"the noisy latent and the picture's ({2 * channels}); for other models use StableDiffusion"
        )
