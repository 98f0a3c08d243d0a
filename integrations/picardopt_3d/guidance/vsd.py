"""Variational score distillation (ProlificDreamer, arXiv 2305.16213, equation 9 and algorithm 1).

Where SDS compares the pretrained score with the noise, VSD compares it with the score of the present renders, which a
LoRA of the same network (or of another one) learns as the scene changes. The LoRA also hears the camera.

The LoRA's step is part of the iteration. In DreamPropeller's released code every worker trains a LoRA of its own on
whatever it happens to render, so that a run depends on the number of workers and no tolerance makes it the sequential
one. Here scene and LoRA are by default two bases of one optimizer: a step's gradients are those of both losses at that
step's parameters, and at tolerance 0 VSD is bitwise the sequential run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from picardopt import ParallelPicardOptimizer
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.protocol import Encoded, EncodedText, Prediction, as_text_prompt
from picardopt_3d.guidance.sds import (
    WEIGHTINGS,
    GuidanceForm,
    Weighting,
    abar_at,
    check_views,
    clip_gradient,
    draw_noise,
    guided_noise,
    loss_with_gradient,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt

Lora = Literal["inside", "paper"]

POSE_SIZE = 16
"""Numbers of a camera-to-world matrix, which the LoRA is told."""


@dataclass(frozen=True)
class VsdConfig:
    """How scores become gradients of the scene and of the LoRA.

    Attributes:
        guidance_scale: Strength `s` of classifier-free guidance of the pretrained score.
        guidance_form: As `SdsConfig.guidance_form`; ProlificDreamer's is "uncond".
        lora_guidance_scale: The same of the LoRA's score, in the form "uncond"; at 1 it is the conditional score
            alone.
        weighting: `w(t)` of the scene's gradient, as `SdsConfig.weighting`.
        lora: "inside": the LoRA is a base of the optimizer, and VSD is exact at tolerance 0. "paper": each process
            trains one of its own at every evaluation, also at those that are thrown away: never exact, a run depends
            on the number of processes and the window, and a checkpoint of the optimizer knows nothing of the LoRA.
        rank: The LoRA's rank.
        learning_rate: Of the LoRA's AdamW (betas 0.9 and 0.99, eps 1e-15).
        drop_camera: Chance that the LoRA is not told a view's camera while it learns.
        clip_value: As `SdsConfig.clip_value`.
        clip_norm: As `SdsConfig.clip_norm`.
        seed: Of the LoRA's first weights.
    """

    guidance_scale: float = 7.5
    guidance_form: GuidanceForm = "uncond"
    lora_guidance_scale: float = 1.0
    weighting: Weighting = "sds"
    lora: Lora = "inside"
    rank: int = 4
    learning_rate: float = 1e-4
    drop_camera: float = 0.1
    clip_value: float | None = None
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers.

        Raises:
            ValueError: One is unknown or out of range.
        """
        for name, known in (
            ("guidance_form", get_args(GuidanceForm)),
            ("weighting", tuple(WEIGHTINGS)),
            ("lora", get_args(Lora)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")
        for name in ("rank", "learning_rate", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")
        if not 0 <= self.drop_camera <= 1:
            raise ValueError(f"drop_camera={self.drop_camera}: give a chance from 0 to 1")


@dataclass(frozen=True, eq=False)
class EncodedVsd(EncodedText):
    """A prompt as VSD needs it.

    Attributes:
        plain: What the LoRA hears from everywhere: the prompt without words for the view.
    """

    plain: EncodedText


class VSD:
    """The VSD loss and the LoRA's own; a `Guidance`.

    It changes the network that carries the LoRA: give that network to no other guidance.

    Args:
        score: The pretrained score model.
        config: How scores become gradients.
        lora_score: The model that carries the LoRA, in the same space (SD 2.1 beside SD 2.1 base, as ProlificDreamer
            has it); by default `score` itself, whose weights are then in memory once.
    """

    def __init__(
        self,
        score: TextDiffusion,
        config: VsdConfig | None = None,
        lora_score: TextDiffusion | None = None,
    ) -> None:
        self.score, self.config = score, config or VsdConfig()
        self.lora_score = score if lora_score is None else lora_score
        self.size = score.size
        _check_pair(score, self.lora_score)
        # The shipped pixel model hears cameras by itself; others learn to hear the matrix.
        self._knows_cameras = self.lora_score.unet.class_embedding is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.lora_parameters = add_lora(self.lora_score.unet, self.config.rank)
        self.optimizer = AdamW(
            self.lora_parameters, lr=self.config.learning_rate, betas=(0.9, 0.99), eps=1e-15
        )

    def bases(self, scene: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
        """All optimizers that a step steps, in their order: the scene's and, if it is inside, the LoRA's."""
        scenes = list(scene) if isinstance(scene, Sequence) else [scene]
        return [*scenes, self.optimizer] if self.config.lora == "inside" else scenes

    def wrap(
        self, scene: Optimizer | Sequence[Optimizer], **options: Any
    ) -> ParallelPicardOptimizer:
        """The optimizer of a run.

        Inside, only the scene's parameters count in residuals (at tolerance 0 all do). The paper's LoRA makes the
        closure impure by its nature, so that its audit is off.

        Args:
            scene: The scene's optimizer or optimizers.
            options: Further ones of `ParallelPicardOptimizer`.
        """
        scenes = list(scene) if isinstance(scene, Sequence) else [scene]
        if self.config.lora == "inside":
            return ParallelPicardOptimizer(self.bases(scene), **{"measured": scenes, **options})
        if options.get("tolerance") == 0:
            warnings.warn(
                'lora="paper" with tolerance=0: not the sequential run, since every process trains a LoRA of its own '
                'at each evaluation; lora="inside" is exact',
                stacklevel=2,
            )
        return ParallelPicardOptimizer(scene, **{**options, "audit": "never"})

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedVsd:
        """Encode a prompt with the score model, and for the LoRA without words for the view."""
        told = self.score.encode(as_text_prompt(prompt))
        plain = self.lora_score.encode(TextPrompt(told.prompt.text, told.prompt.negative))
        return EncodedVsd(told.prompt, told.conditional, told.unconditional, plain)

    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """The sum of two losses that share no gradient: VSD's reaches the views alone, the LoRA's the LoRA alone.

        VSD's gradient with respect to `x`, the views in the model's space, is `w(t) (eps_hat - eps_lora) / batch`. The
        LoRA learns to predict what its network predicts (noise, or velocity) for `x`, at noise levels of the whole
        schedule. With `lora="paper"` it has learnt when this returns, and the loss is VSD's alone.

        Drawn from torch's global CPU generator, in this order: what `to_model_space` draws, VSD's noise levels and
        noise, the LoRA's noise levels and noise, which cameras it is not told.

        Args:
            views: Rendered RGB in [0, 1], with a gradient. [batch, 3, height, width]
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level of VSD, as fractions of the schedule.

        Raises:
            TypeError: The prompt was encoded by something else.
            ValueError: The shapes disagree, or the range is empty or outside of 0 to 1.
        """
        check_views(views, cameras)
        if not isinstance(prompt, EncodedVsd):
            raise TypeError(
                f"prompt of type {type(prompt).__name__}: give what this guidance's own `encode` made"
            )
        clean = self.score.to_model_space(views)
        draws = draw_noise(clean, timestep_range, len(self.score.alphas_cumprod))
        lora_draws = draw_noise(clean, (0.0, 1.0), len(self.lora_score.alphas_cumprod))
        told = torch.rand(len(views)) >= self.config.drop_camera
        loss = loss_with_gradient(clean, self._gradient(clean, *draws, prompt, cameras))
        lora_loss = self._lora_loss(clean.detach(), *lora_draws, prompt, cameras, told)
        if self.config.lora == "inside":
            return loss + lora_loss
        self._learn(lora_loss)
        return loss

    @torch.no_grad()
    def _gradient(
        self, clean: Tensor, timesteps: Tensor, noise: Tensor, prompt: EncodedVsd, cameras: Cameras
    ) -> Tensor:
        """What pulls the views from where the LoRA sees them to where the pretrained model wants them."""
        config, abar = self.config, abar_at(self.score, timesteps)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        with self._pretrained():
            predicted = self.score.predict_noise(noisy, timesteps, prompt, cameras)
        wanted = guided_noise(predicted, config.guidance_scale, config.guidance_form)
        gradient = WEIGHTINGS[config.weighting](abar) * (
            wanted - self._present(noisy, timesteps, prompt, cameras)
        )
        return clip_gradient(gradient, config.clip_value, config.clip_norm)

    def _present(
        self, noisy: Tensor, timesteps: Tensor, prompt: EncodedVsd, cameras: Cameras
    ) -> Tensor:
        """The LoRA's score, guided from the unconditional one that hears no camera either."""
        scale, told = self.config.lora_guidance_scale, prompt.plain.at(cameras)
        labels = self._labels(cameras)
        ask = self.lora_score.noise
        conditional = ask(noisy, timesteps, told.conditional, labels)
        if scale == 1:
            return conditional
        unconditional = ask(noisy, timesteps, told.unconditional, torch.zeros_like(labels))
        return guided_noise(Prediction(conditional, unconditional), scale)

    def _lora_loss(
        self,
        clean: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        prompt: EncodedVsd,
        cameras: Cameras,
        told: Tensor,
    ) -> Tensor:
        """Mean squared error of what the LoRA's network predicts."""
        labels = self._labels(cameras)
        labels = labels * told.to(labels)[:, None]
        abar = abar_at(self.lora_score, timesteps)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        texts = prompt.plain.at(cameras).conditional
        predicted = self.lora_score.noise(noisy, timesteps, texts, labels)
        per_view = (predicted - noise).square().mean((1, 2, 3), keepdim=True)
        return (per_view * _AS_PREDICTED[self.lora_score.prediction_type](abar)).mean()

    def _labels(self, cameras: Cameras) -> Tensor:
        """What the LoRA's network is told of the cameras; zeros stand for "unknown". [batch, numbers]."""
        labels = self.lora_score.class_labels(cameras)
        return cameras.camera_to_world.flatten(1) if labels is None else labels

    def _learn(self, loss: Tensor) -> None:
        """A step of this process's own LoRA."""
        gradients = torch.autograd.grad(loss, self.lora_parameters)
        for parameter, gradient in zip(self.lora_parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def _pretrained(self) -> Iterator[None]:
        """The network as it was before it got a LoRA, if both scores come from the same one."""
        unet = self.lora_score.unet
        if unet is not self.score.unet:
            yield
            return
        embedding = unet.class_embedding
        unet.disable_adapters()
        if not self._knows_cameras:
            unet.class_embedding = None
        try:
            yield
        finally:
            unet.class_embedding = embedding
            unet.enable_adapters()


_AS_PREDICTED: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": torch.ones_like,
    "v_prediction": lambda abar: 1 / abar,
    "sample": lambda abar: (1 - abar) / abar,
}
"""What the squared error of the noise is multiplied with to be that of the predicted quantity, by abar."""


class PoseEmbedding(TimestepEmbedding):  # type: ignore[misc]
    """Embeds poses in its own precision, whatever the UNet computes in."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed. [batch, POSE_SIZE] to [batch, channels]."""
        embedding: Tensor = super().forward(sample.to(self.linear_1.weight.dtype), condition)
        return embedding


def add_lora(unet: Any, rank: int) -> list[nn.Parameter]:
    """Put a LoRA on a UNet's attention and, if it takes no class labels, an embedding of 16 numbers of a camera.

    Args:
        unet: A `UNet2DConditionModel`, frozen. Its other weights stay as they are.
        rank: The LoRA's rank, and its alpha.

    Returns:
        What is to be trained, in float32.

    Raises:
        ValueError: It has a LoRA already, or is moved between devices as it is used.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError(
            "the unet carries a LoRA already: load the model again for a second VSD guidance"
        )
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    parameters = [p for name, p in unet.named_parameters() if "lora_" in name]
    if unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = PoseEmbedding(POSE_SIZE, width).to(unet.device)
        parameters += list(unet.class_embedding.parameters())
    for parameter in parameters:  # beside half-precision weights too: AdamW's steps are small
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def _check_pair(score: TextDiffusion, lora_score: TextDiffusion) -> None:
    """Check that both models work in one space, and that the LoRA's stays where it is trained.

    Raises:
        ValueError: They do not, or it does not.
    """
    channels, lora_channels = (x.unet.config.in_channels for x in (score, lora_score))
    if channels != lora_channels:
        raise ValueError(
            f"score works on {channels} channels and lora_score on {lora_channels}: give two models of one latent "
            "space, such as Stable Diffusion 2.1 base and 2.1"
        )
    if lora_score.options.offload != "none":
        raise ValueError(
            f"offload={lora_score.options.offload!r} of the model that carries the LoRA: it is trained, so load it "
            "without offload"
        )
