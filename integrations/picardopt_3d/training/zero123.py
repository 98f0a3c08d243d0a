"""Trains the small Zero-1-to-3 model that ships with the package: an image and a relative pose in, a view out.

    python -m picardopt_3d.training.zero123 --out training/zero123 --vae training/autoencoder/pipeline

Writes `pipeline/`, a folder with the parts of the published checkpoints in diffusers format, and the other files that
`picardopt_3d.training.text_to_view` lists. It is trained on all subjects: the image shows the object, so that there are
no combinations of words to hold out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from picardopt_3d.cameras import CameraConfig, orbit_cameras
from picardopt_3d.compat import CLIPImageProcessorPil
from picardopt_3d.guidance.zero123_pipeline import (
    CLIPCameraProjection,
    Zero123Pipeline,
    embed_image,
    relative_pose,
)
from picardopt_3d.training.diffusion import velocity_loss
from picardopt_3d.training.loop import LoopConfig, Trainer, load_views, run
from picardopt_3d.training.models import (
    UNetSizes,
    VisionSizes,
    build_unet,
    half,
    latent_scheduler,
    vision_config,
)
from picardopt_3d.training.sheets import save_sheet, sheet_cameras
from picardopt_3d.world import COLOURS, SHAPES, Subject, all_subjects, render

CAMERAS = CameraConfig(elevation=(-10.0, 80.0), distance=(1.5, 1.8), fov=(42.5, 42.5))
"""Distribution of its cameras, with one field of view, because a relative pose does not contain it."""


@dataclass(frozen=True, kw_only=True)
class Zero123Config(LoopConfig):
    """Options of the Zero-1-to-3 model's training.

    Attributes:
        vae: Folder of the trained autoencoder.
        drop: Probability that image and pose are both left out (for classifier-free guidance).
        unet: Sizes of the score model.
        vision: Sizes of the image encoder.
    """

    vae: Path
    drop: float = 0.1
    unet: UNetSizes = field(default_factory=lambda: UNetSizes((48, 96), (True, True)))
    vision: VisionSizes = field(
        default_factory=lambda: VisionSizes(size=64, patch=8, layers=3, embedding=96)
    )


class Zero123Trainer(Trainer):
    """Trains UNet, image encoder and projection together, on a trained autoencoder."""

    config: Zero123Config

    def __init__(self, config: Zero123Config) -> None:
        self.vae = AutoencoderKL.from_pretrained(config.vae, low_cpu_mem_usage=False).float()
        self.vae.to(config.device, memory_format=torch.channels_last).requires_grad_(False).eval()
        pixels, channels = self.vae.config.sample_size, self.vae.config.latent_channels
        self.views = load_views(config, pixels, CAMERAS, all_subjects())
        size = pixels // 2 ** (len(self.vae.config.block_out_channels) - 1)
        width = config.vision.embedding
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.unet = build_unet(config.unet, size, 2 * channels, channels, width)
            self.image_encoder = CLIPVisionModelWithProjection(vision_config(config.vision))
            self.projection = CLIPCameraProjection(width)
        side = {"height": config.vision.size, "width": config.vision.size}
        self.feature_extractor = CLIPImageProcessorPil(size=side, do_center_crop=False)
        self.unet.to(memory_format=torch.channels_last)
        super().__init__(
            config,
            {
                "unet": self.unet,
                "image_encoder": self.image_encoder,
                "clip_camera_projection": self.projection,
            },
        )
        self.scheduler = latent_scheduler()

    def loss(self) -> Tensor:
        """Returns the squared error of the predicted velocity of the target's latents, for random pairs of views."""
        config, seen = self.config, self.views.draw(self.config.batch, self.generator)
        target = self.views.again(seen, self.generator)
        device = config.device
        keep = torch.rand(config.batch, 1, generator=self.generator, device=device) >= config.drop
        images = self.views.clean(seen).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            beside = self.vae.encode(images).latent_dist.mode().float()
            views = self.views.clean(target).contiguous(memory_format=torch.channels_last)
            posterior = self.vae.encode(views).latent_dist
            noise = torch.randn(beside.shape, generator=self.generator, device=device)
            latents = posterior.mean.float() + posterior.std.float() * noise
        embedding = embed_image(self.image_encoder, self.feature_extractor, images / 2 + 0.5)
        pose = relative_pose(self.views.pose(seen)[:, :3], self.views.pose(target)[:, :3])
        attended = self.projection(torch.cat([embedding, pose], dim=-1)) * keep
        return velocity_loss(
            self.unet,
            self.scheduler,
            latents * self.vae.config.scaling_factor,
            self.generator,
            beside=beside * keep[..., None, None],
            encoder_hidden_states=attended[:, None],
        )

    def save_model(self, folder: Path) -> None:
        """Writes the pipeline folder."""
        Zero123Pipeline(
            half(self.vae),
            half(self.image_encoder),
            half(self.unet),
            self.scheduler,
            self.feature_extractor,
            half(self.projection),
        ).save_pretrained(folder)

    def sample_sheet(self, path: Path) -> None:
        """Writes a picture of each shape in one colour: the reference, then samples from six cameras."""
        pipeline = Zero123Pipeline(
            self.vae,
            self.image_encoder,
            self.unet,
            self.scheduler,
            self.feature_extractor,
            self.projection,
        )
        pipeline.set_progress_bar_config(disable=True)
        reference, cameras = orbit_cameras(20.0, 30.0, 1.65, 42.5), sheet_cameras()
        poses = [
            torch.stack([c.elevation, c.azimuth, c.distance], dim=-1) for c in (reference, cameras)
        ]
        size, rows = self.vae.config.sample_size, []
        for shape, colour in zip(SHAPES, COLOURS, strict=True):
            image, _ = render(Subject(shape, colour), reference, size, size)
            views = pipeline(
                image.expand(len(cameras), -1, -1, -1),
                relative_pose(*poses),
                num_inference_steps=self.config.sample_steps,
                generator=torch.Generator().manual_seed(0),
            )
            rows.append(torch.cat([image, views.cpu()]))
        save_sheet(rows, path)


if __name__ == "__main__":
    run(Zero123Trainer(tyro.cli(Zero123Config, description=__doc__)))
