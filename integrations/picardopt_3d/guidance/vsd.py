"""Variational score distillation (ProlificDreamer, arXiv 2305.16213, equation 9 and algorithm 1).

SDS compares the pretrained score with the noise. VSD compares it with the score of the current renders, which a LoRA of
the same network (or of another one) learns as the scene changes. The LoRA is conditioned on the camera, too.

The LoRA's step is part of the iteration. In DreamPropeller's released code every worker trains a LoRA of its own on its
own renders, so that a run depends on the number of workers and no tolerance reproduces the sequential run. Here the
guidance owns the LoRA's optimizer, which by default is stepped with the scene's: a step's gradients are those of both
losses at that step's parameters, and at tolerance 0 VSD is bitwise the sequential run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from picardopt import batched
from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.diffusion import ERROR_FACTORS, TextDiffusion
from picardopt_3d.guidance.draws import check_views, draw_noise
from picardopt_3d.guidance.joinable import in_parts, joined_if_shared, most_at_once
from picardopt_3d.guidance.loss_config import WEIGHTINGS, VsdConfig
from picardopt_3d.guidance.protocol import (
    Encoded,
    EncodedText,
    Guidance,
    Prediction,
    as_text_prompt,
)
from picardopt_3d.guidance.sds import (
    abar_at,
    clip_gradient,
    guided_noise,
    loss_with_gradient,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt


@dataclass(frozen=True, eq=False)
class EncodedVsd(EncodedText):
    """A prompt as VSD needs it.

    Attributes:
        plain: The LoRA's encoding, the same for all views: the prompt without words for the view.
    """

    plain: EncodedText


class VSD(Guidance):
    """The VSD loss, and the loss that trains its LoRA.

    The network with the LoRA is changed: do not use it in another guidance.

    Args:
        score: The pretrained score model.
        config: Options of the loss.
        lora_score: The model to add the LoRA to, in the same space (ProlificDreamer has SD 2.1 beside SD 2.1 base); by
            default `score` itself, so that the weights are in memory once.
    """

    def __init__(
        self,
        score: TextDiffusion,
        config: VsdConfig | None = None,
        lora_score: TextDiffusion | None = None,
    ) -> None:
        self.score, self.config = score, config or VsdConfig()
        self.lora_score = score if lora_score is None else lora_score
        self.size, self.repeatable = score.size, self.config.lora == "inside"
        self._pretrained_noise = batched(pretrained_noise)
        _check_pair(score, self.lora_score)
        # The shipped pixel model takes cameras; other models get an embedding of the camera's matrix.
        self._knows_cameras = self.lora_score.unet.class_embedding is not None
        from picardopt_3d.guidance.lora import add_lora  # diffusers and peft take seconds to import

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self._lora = add_lora(self.lora_score.unet, self.config.rank)
        self.lora_parameters = list(self._lora.values())
        groups = [{"params": self.lora_parameters, "name": "lora"}]
        self.optimizer = AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.99), eps=1e-15)

    def optimizers(self) -> list[Optimizer]:
        """Returns the LoRA's optimizer, if it is stepped with the scene's."""
        return [self.optimizer] if self.config.lora == "inside" else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the LoRA's weights and, if each process trains its own LoRA, the state of its optimizer."""
        state: dict[str, Any] = {"lora": {n: p.detach().clone() for n, p in self._lora.items()}}
        if self.config.lora == "paper":
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            KeyError: The state holds no LoRA.
            RuntimeError: The state's LoRA has other layers or another rank.
        """
        if "lora" not in state:
            raise KeyError(
                "lora: the state belongs to a run without variational score distillation"
            )
        found: Mapping[str, Tensor] = state["lora"]
        shapes = {name: parameter.shape for name, parameter in self._lora.items()}
        if {name: value.shape for name, value in found.items()} != shapes:
            raise RuntimeError(
                f"lora: the state's LoRA has other layers or another rank than {self.config.rank}; use the run's own "
                "model and rank"
            )
        with torch.no_grad():
            for name, parameter in self._lora.items():
                parameter.copy_(found[name])
        if self.config.lora == "paper":
            self.optimizer.load_state_dict(state["optimizer"])

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedVsd:
        """Encodes a prompt with the score model, and for the LoRA without words for the view."""
        encoded = self.score.encode(as_text_prompt(prompt))
        plain = self.lora_score.encode(TextPrompt(encoded.prompt.text, encoded.prompt.negative))
        return EncodedVsd(encoded.prompt, encoded.conditional, encoded.unconditional, plain)

    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """Returns the sum of two losses: VSD's, with a gradient for the views, and the LoRA's, with one for the LoRA.

        VSD's gradient with respect to `x`, the views in the model's space, is `w(t) (eps_hat - eps_lora) / batch`. The
        LoRA learns to predict the noise (or the velocity) in `x`, at noise levels of the whole schedule. With
        `lora="paper"` the LoRA is trained within this call, and the loss is VSD's alone.

        Random numbers come from torch's global CPU generator, in this order: those of `to_model_space`, VSD's noise
        levels and noise, the LoRA's noise levels and noise, the cameras that are hidden from the LoRA.

        Args:
            views: Rendered RGB in [0, 1], with a gradient, `[batch, 3, height, width]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level of VSD, as fractions of the schedule.

        Raises:
            TypeError: The prompt was not encoded by this guidance.
            ValueError: The shapes disagree, or the range is empty or outside [0, 1].
        """
        check_views(views, cameras)
        if not isinstance(prompt, EncodedVsd):
            raise TypeError(
                f"prompt of type {type(prompt).__name__}: give what this guidance's own `encode` returned"
            )
        clean = self.score.to_model_space(views)
        like, levels = (clean.shape, clean.device), len(self.score.alphas_cumprod)
        draws = draw_noise(*like, timestep_range, levels)
        lora_draws = draw_noise(*like, (0.0, 1.0), len(self.lora_score.alphas_cumprod))
        shown = torch.rand(len(views)) >= self.config.drop_camera
        loss = loss_with_gradient(clean, self._gradient(clean, *draws, prompt, cameras))
        lora_loss = self._lora_loss(clean.detach(), *lora_draws, prompt, cameras, shown)
        if self.config.lora == "inside":
            return loss + lora_loss
        self._learn(lora_loss)
        return loss

    @torch.no_grad()
    def _gradient(
        self, clean: Tensor, timesteps: Tensor, noise: Tensor, prompt: EncodedVsd, cameras: Cameras
    ) -> Tensor:
        """Returns VSD's gradient, the weighted difference of the pretrained score and the LoRA's, clipped."""
        config, abar = self.config, abar_at(self.score, timesteps)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        wanted = joined_if_shared(self._pretrained_noise, self.score, len(noisy))(
            noisy,
            timesteps,
            cameras,
            vsd=self,
            prompt=prompt,
            at_once=most_at_once(self.score, len(noisy)),
        )
        gradient = WEIGHTINGS[config.weighting](abar) * (
            wanted - self._present(noisy, timesteps, prompt, cameras)
        )
        return clip_gradient(gradient, config.clip_value, config.clip_norm)

    def _present(
        self, noisy: Tensor, timesteps: Tensor, prompt: EncodedVsd, cameras: Cameras
    ) -> Tensor:
        """Returns the LoRA's guided score; the unconditional score has no camera either."""
        scale, texts = self.config.lora_guidance_scale, prompt.plain.at(cameras)
        labels = self._labels(cameras)
        ask = self.lora_score.noise
        conditional = ask(noisy, timesteps, texts.conditional, labels)
        if scale == 1:
            return conditional
        unconditional = ask(noisy, timesteps, texts.unconditional, torch.zeros_like(labels))
        return guided_noise(Prediction(conditional, unconditional), scale)

    def _lora_loss(
        self,
        clean: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        prompt: EncodedVsd,
        cameras: Cameras,
        shown: Tensor,
    ) -> Tensor:
        """Returns the mean squared error of the LoRA's prediction; cameras that are not `shown` are hidden from it."""
        labels = self._labels(cameras)
        labels = labels * shown.to(labels)[:, None]
        abar = abar_at(self.lora_score, timesteps)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        texts = prompt.plain.at(cameras).conditional
        predicted = self.lora_score.noise(noisy, timesteps, texts, labels)
        per_view = (predicted - noise).square().mean((1, 2, 3), keepdim=True)
        return (per_view * ERROR_FACTORS[self.lora_score.prediction_type](abar)).mean()

    def _labels(self, cameras: Cameras) -> Tensor:
        """Returns the cameras as class labels of the LoRA's network, `[batch, numbers]`; zeros stand for "unknown"."""
        labels = self.lora_score.class_labels(cameras)
        return cameras.camera_to_world.flatten(1) if labels is None else labels

    def _learn(self, loss: Tensor) -> None:
        """Takes one step of this process's own LoRA."""
        gradients = torch.autograd.grad(loss, self.lora_parameters)
        for parameter, gradient in zip(self.lora_parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def _pretrained(self) -> Iterator[None]:
        """Disables the LoRA within a block if the pretrained score comes from the same network."""
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


def pretrained_noise(
    noisy: Tensor,
    timesteps: Tensor,
    cameras: Cameras,
    *,
    vsd: VSD,
    prompt: EncodedVsd,
    at_once: int,
) -> Tensor:
    """Returns the pretrained model's guided noise, `[batch, channels, height, width]`; no row needs another.

    Args:
        noisy: Noisy views in the model's space, `[batch, channels, height, width]`.
        timesteps: Noise levels, `[batch]`.
        cameras: The cameras of the views.
        vsd: The guidance; its LoRA is disabled meanwhile.
        prompt: From its `encode`.
        at_once: Most views of one pass.
    """
    config, guided = vsd.config, []
    with vsd._pretrained():
        for some, levels, seen in in_parts(at_once, noisy, timesteps, cameras):
            predicted = vsd.score.predict_noise(some, levels, prompt, seen)
            guided.append(guided_noise(predicted, config.guidance_scale, config.guidance_form))
    return torch.cat(guided)


def _check_pair(score: TextDiffusion, lora_score: TextDiffusion) -> None:
    """Checks that both models work in one space, and that the LoRA's model is not offloaded.

    Raises:
        ValueError: The models have different channels, or the LoRA's model is offloaded.
    """
    channels, lora_channels = (x.unet.config.in_channels for x in (score, lora_score))
    if channels != lora_channels:
        raise ValueError(
            f"score has {channels} channels and lora_score has {lora_channels}: give two models of one latent "
            "space, such as Stable Diffusion 2.1 base and 2.1"
        )
    if lora_score.options.offload != "none":
        raise ValueError(
            f"offload={lora_score.options.offload!r} of the model with the LoRA: it is trained, so load it "
            "without offload"
        )
