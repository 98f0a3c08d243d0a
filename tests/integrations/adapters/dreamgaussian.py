"""Stands for DreamGaussian: the parts of its interface that the adapter uses, over points in the plane."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.problems import quantize

GROUPS = {"xyz": "_xyz", "f_rest": "_features_rest", "opacity": "_opacity"}


def options(**changed: Any) -> SimpleNamespace:
    """A configuration, by DreamGaussian's names."""
    values = {
        "gui": False,
        "iters": 40,
        "batch_size": 2,
        "density_start_iter": 3,
        "density_end_iter": 30,
        "densification_interval": 8,
        "opacity_reset_interval": 11,
        "densify_grad_threshold": 0.05,
        "picard": {},
    }
    return SimpleNamespace(**{**values, **changed})


class GaussianModel:
    """Its optimizer, statistics and densification."""

    def __init__(self, count: int = 6) -> None:
        draw = torch.Generator().manual_seed(0)
        self._xyz = nn.Parameter(torch.randn(count, 2, generator=draw))
        self._features_rest = nn.Parameter(torch.zeros(count, 0, 3))
        self._opacity = nn.Parameter(torch.randn(count, 1, generator=draw))
        self.reset_statistics()

    def training_setup(self) -> None:
        groups = [
            {"params": [getattr(self, attribute)], "lr": 2e-3, "name": name}
            for name, attribute in GROUPS.items()
        ]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
        self.xyz_scheduler_args = lambda step: 4e-3 * 0.97**step

    def update_learning_rate(self, iteration: int) -> None:
        for group in self.optimizer.param_groups:
            if group["name"] == "xyz":
                group["lr"] = self.xyz_scheduler_args(iteration)

    def reset_statistics(self) -> None:
        count = len(self._xyz)
        self.max_radii2D = torch.zeros(count)
        self.xyz_gradient_accum, self.denom = torch.zeros(count, 1), torch.zeros(count, 1)

    def add_densification_stats(self, points: Any, seen: Tensor) -> None:
        self.xyz_gradient_accum[seen] += points.grad[seen, :2].norm(dim=-1, keepdim=True)
        self.denom[seen] += 1

    def _replace(self, values: dict[str, Tensor], parents: Tensor) -> None:
        for group in self.optimizer.param_groups:
            old = group["params"][0]
            state = self.optimizer.state.pop(old)
            new = group["params"][0] = nn.Parameter(values[group["name"]])
            self.optimizer.state[new] = {
                key: value[parents] if value.shape == old.shape else value
                for key, value in state.items()
            }
            setattr(self, GROUPS[group["name"]], new)

    def values(self) -> dict[str, Tensor]:
        return {name: getattr(self, attribute).detach() for name, attribute in GROUPS.items()}

    def densify_and_prune(self, threshold: float) -> None:
        pulled = (self.xyz_gradient_accum / self.denom).nan_to_num() >= threshold
        kept = (self._opacity.detach().sigmoid() > 0.1)[:, 0] & (self.max_radii2D < 100)
        parents = torch.cat([kept.nonzero()[:, 0], (kept & pulled[:, 0]).nonzero()[:, 0]])
        values = {name: value[parents] for name, value in self.values().items()}
        values["xyz"] = values["xyz"] + torch.normal(torch.zeros_like(values["xyz"]), 0.1)
        self._replace(values, parents)
        self.reset_statistics()

    def reset_opacity(self) -> None:
        values = {**self.values(), "opacity": self._opacity.detach().clamp(max=-1.0)}
        self._replace(values, torch.arange(len(self._xyz)))


class GUI:
    """Its loop, as it is (`own_train_step`) and as the diff changes it (`train_step`)."""

    def __init__(self, adapter: Any, opt: Any) -> None:
        self.adapter, self.opt, self.step = adapter, opt, 0
        self.renderer = SimpleNamespace(gaussians=GaussianModel())

    def prepare_train(self, wrapped: bool) -> None:
        gaussians = self.renderer.gaussians
        gaussians.training_setup()
        self.optimizer = self.adapter.wrap(self) if wrapped else gaussians.optimizer

    def render(self, angle: float) -> dict[str, Tensor]:
        gaussians = self.renderer.gaussians
        screen = torch.zeros_like(gaussians._xyz, requires_grad=True) + 0
        screen.retain_grad()
        centres = quantize(gaussians._xyz) + screen
        across = centres @ torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
        radii = (10 * across.detach().abs()).int()
        image = across[:, None] * quantize(gaussians._opacity).sigmoid()
        return {
            "image": image + gaussians._features_rest.sum(),
            "viewspace_points": screen,
            "visibility_filter": radii > 3,
            "radii": radii,
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        ratio, loss = min(1, step / self.opt.iters), torch.zeros(())
        for _ in range(self.opt.batch_size):
            out = self.render(np.random.randint(-180, 180) / 57.3)
            noise = torch.randn(()) + np.random.rand()
            loss = loss + (out["image"] - noise - ratio).square().mean()
        return loss, out

    def record(self, step: int, out: Any) -> None:
        gaussians = self.renderer.gaussians
        if step >= self.opt.density_start_iter and step <= self.opt.density_end_iter:
            points, seen, radii = (
                out[name] for name in ("viewspace_points", "visibility_filter", "radii")
            )
            gaussians.max_radii2D[seen] = torch.max(gaussians.max_radii2D[seen], radii[seen])
            gaussians.add_densification_stats(points, seen)

    def densify(self, step: int) -> None:
        gaussians = self.renderer.gaussians
        if step % self.opt.densification_interval == 0:
            gaussians.densify_and_prune(self.opt.densify_grad_threshold)
        if step % self.opt.opacity_reset_interval == 0:
            gaussians.reset_opacity()

    def own_train_step(self) -> Tensor:
        self.step += 1
        self.renderer.gaussians.update_learning_rate(self.step)
        loss, out = self.loss(self.step)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.record(self.step, out)
        if self.opt.density_start_iter <= self.step <= self.opt.density_end_iter:
            self.densify(self.step)
        return loss.detach()

    def train_step(self) -> Tensor:
        self.step += 1
        loss: Tensor = self.adapter.step(self)
        return loss


def present(gui: GUI) -> dict[str, Any]:
    """What a run comes to."""
    gaussians = gui.renderer.gaussians
    groups = gaussians.optimizer.param_groups
    return {
        "parameters": [group["params"][0].detach().clone() for group in groups],
        "held": [value.clone() for value in gaussians.values().values()],
        "state": [gaussians.optimizer.state[group["params"][0]] for group in groups],
        "statistics": [
            gaussians.max_radii2D.clone(),
            gaussians.xyz_gradient_accum.clone(),
            gaussians.denom.clone(),
        ],
        "rates": [float(group["lr"]) for group in groups],
    }
