"""Score distillation through a UNet of published size with random weights, for the benchmarks that need a GPU.

Its cost does not depend on the weights. The scene is a table of features that is looked up, decoded and scored: a hash
grid's memory traffic without its library.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from full_size_models import DEEPFLOYD, STABLE_DIFFUSION, TOKENS, build_unet
from picardopt_3d.guidance.loading import ModelOptions
from torch import Tensor

PARAMETERS = 12_599_920
"""Of the scene, as in the hash grid of the published NeRF pipelines."""
MODELS = {"sd21": STABLE_DIFFUSION, "if-xl": DEEPFLOYD}
"""Stable Diffusion 2.1's UNet (866 million parameters) and DeepFloyd IF-I-XL's (4.3 thousand million)."""


class Unet:
    """A UNet and random text embeddings for it.

    Args:
        name: One of `MODELS`.
        device: Where.
        small: A tiny one in float32, to check a script itself.
        compiled: Whether torch.compile makes it, at its first call.
    """

    def __init__(
        self, name: str, device: torch.device, *, small: bool = False, compiled: bool = False
    ) -> None:
        options = ModelOptions(dtype="float32" if small or device.type == "cpu" else "float16")
        unet = build_unet(MODELS[name], device, options, small)
        unet = unet.requires_grad_(False).eval()
        config, self.dtype, self.device = unet.config, unet.dtype, device
        self.channels, self.size = config.in_channels, config.sample_size
        width = config.encoder_hid_dim or config.cross_attention_dim
        self.text = torch.randn(1, TOKENS, width, device=device, dtype=self.dtype)
        self._call = torch.compile(unet) if compiled else unet

    def gradient(self, views: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns the gradient of score distillation by the views, with classifier-free guidance.

        Args:
            views: Without a gradient, `[views, channels, size, size]`.
            noise: Of the same shape.
            times: Noise levels, `[views]`.
        """
        both = (views + noise).to(self.dtype).repeat(2, 1, 1, 1)
        text = self.text.expand(len(both), -1, -1)
        predicted = self._call(both, times.repeat(2), text).sample[:, : self.channels]
        plain, prompted = predicted.float().chunk(2)
        return plain + 7.5 * (prompted - plain) - noise


class Distillation:
    """A scene that is optimized through a UNet.

    Args:
        unet: The UNet.
        batch: Views a step.
        parameters: Of the scene, about.
        gradient: Instead of the UNet's own, for example one call for several slots.
    """

    def __init__(
        self,
        unet: Unet,
        batch: int,
        parameters: int = PARAMETERS,
        gradient: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self._unet, self._batch = unet, batch
        self._gradient = gradient or unet.gradient
        generator = torch.Generator(unet.device).manual_seed(0)
        table = torch.randn(parameters // 2, 2, device=unet.device, generator=generator)
        self._table = torch.nn.Parameter(1e-2 * table)
        self._decoder = torch.nn.Linear(16, unet.channels).to(unet.device)
        self.parameters = [self._table, *self._decoder.parameters()]

    def __call__(self) -> Tensor:
        """The closure: renders views, asks the UNet what to change, and carries that back to the scene."""
        for parameter in self.parameters:
            parameter.grad = None
        unet, device = self._unet, self._unet.device
        pixels = self._batch * unet.size**2
        rows = torch.randint(len(self._table), (pixels, 8), device=device)
        colors = self._decoder(self._table[rows].flatten(1))
        views = colors.view(self._batch, unet.size, unet.size, -1).permute(0, 3, 1, 2)
        noise = torch.randn_like(views)
        times = torch.randint(20, 980, (self._batch,), device=device)
        with torch.no_grad():
            gradient = self._gradient(views.detach(), noise, times)
        loss = (views * gradient).sum() / self._batch
        loss.backward()
        return loss.detach()


def milliseconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Returns the time of a call; waits for the device before and after them all."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
    return 1e3 * (time.perf_counter() - start) / calls


def wait(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
