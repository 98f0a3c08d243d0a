"""Stands for threestudio: its registry, its updates by step, and a system with all that steps rewrite there."""

import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers.problems import quantize

REGISTERED: dict[str, type] = {}


class Config(dict[str, Any]):
    """A part of a configuration, as OmegaConf's."""

    __getattr__ = dict.__getitem__


def register(name: str) -> Callable[[type], type]:
    def decorate(kind: type) -> type:
        REGISTERED[name] = kind
        return kind

    return decorate


def find(name: str) -> type:
    """`main:first,second` names a class with the others in front."""
    main, _, others = name.partition(":")
    names = [*others.split(","), main] if others else [main]
    bases = tuple(REGISTERED[each] for each in names)
    return type(name, bases, {}) if others else bases[0]


class Updateable:
    """Passes the step on to every attribute that is updateable too."""

    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._pass_on("do_update_step", epoch, global_step)
        self.update_step(epoch, global_step)

    def do_update_step_end(self, epoch: int, global_step: int) -> None:
        self._pass_on("do_update_step_end", epoch, global_step)
        self.update_step_end(epoch, global_step)

    def _pass_on(self, name: str, *now: int) -> None:
        for attribute in self.__dir__():
            if attribute.startswith("_"):
                continue
            try:
                value = getattr(self, attribute)
            except Exception:
                continue
            if isinstance(value, Updateable):
                getattr(value, name)(*now)

    def update_step(self, epoch: int, global_step: int) -> None:
        pass

    def update_step_end(self, epoch: int, global_step: int) -> None:
        pass


def update_if_possible(value: Any, epoch: int, global_step: int) -> None:
    if isinstance(value, Updateable):
        value.do_update_step(epoch, global_step)


def update_end_if_possible(value: Any, epoch: int, global_step: int) -> None:
    if isinstance(value, Updateable):
        value.do_update_step_end(epoch, global_step)


def parse_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    return getattr(torch.optim, config.name)(model.parameters(), **config.args)


def parse_scheduler(config: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kind = getattr(torch.optim.lr_scheduler, config.name)
    return {
        "scheduler": kind(optimizer, **config.args),
        "interval": config.get("interval", "epoch"),
    }


def install() -> None:
    """Registers the modules that the extension imports."""
    contents: dict[str, dict[str, Any]] = {
        "threestudio": {"register": register, "find": find},
        "threestudio.systems": {},
        "threestudio.systems.utils": {
            "parse_optimizer": parse_optimizer,
            "parse_scheduler": parse_scheduler,
        },
        "threestudio.utils": {},
        "threestudio.utils.base": {
            "update_if_possible": update_if_possible,
            "update_end_if_possible": update_end_if_possible,
        },
        "threestudio.utils.config": {"config_to_primitive": dict},
    }
    for name, values in contents.items():
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(values)


class Encoding(nn.Module, Updateable):
    """Levels are added to a mask that is no buffer, and are never taken away (ProgressiveBandHashGrid)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, generator=torch.Generator().manual_seed(1)))
        self.current_level, self.mask = 2, torch.zeros(6)

    def forward(self) -> Tensor:
        return quantize(self.table) * self.mask

    def update_step(self, epoch: int, global_step: int) -> None:
        self.current_level = min(2 + global_step // 9, 6)
        self.mask[: self.current_level] = 1.0


class Grid(nn.Module):
    """An occupancy grid (nerfacc): `occs` is written into, another tensor is put in the place of `binaries`."""

    occs: Tensor
    binaries: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("occs", torch.zeros(8))
        self.register_buffer("binaries", torch.zeros(8, dtype=torch.bool))

    @torch.no_grad()
    def update_every_n_steps(self, step: int, occ_eval_fn: Callable[[Tensor], Tensor]) -> None:
        if step % 3 == 0:
            cells = torch.randint(8, (4,))
            self.occs.mul_(0.5)
            self.occs[cells] = torch.maximum(self.occs[cells], occ_eval_fn(cells))
            self.binaries = self.occs > self.occs.mean().clamp(max=0.3)


class Renderer(nn.Module, Updateable):
    """Holds the grid; reaches the geometry by a property, as threestudio's does."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.estimator, self.sub_modules = Grid(), SimpleNamespace(geometry=encoding)
        self.cells = nn.Parameter(torch.rand(8, generator=torch.Generator().manual_seed(2)))

    @property
    def geometry(self) -> Encoding:
        return self.sub_modules.geometry

    def forward(self) -> Tensor:
        shown = quantize(self.cells) * (0.5 + self.estimator.binaries.float())
        return shown.sum() + self.geometry().sum()

    def update_step(self, epoch: int, global_step: int) -> None:
        self.estimator.update_every_n_steps(global_step, lambda cells: quantize(self.cells)[cells])


class Guidance(Updateable):
    """No module; its largest noise level follows the step."""

    max_step = 0.0

    def __call__(self, view: Tensor, direction: Tensor) -> dict[str, Tensor]:
        level = self.max_step * torch.rand(())
        gradient = torch.randn(()) * level + direction.sum() + (random.random() - 0.5)
        return {"loss_sds": view * gradient, "level": level}

    def update_step(self, epoch: int, global_step: int) -> None:
        self.max_step = 1.0 / (1 + global_step // 7)


class Cameras(IterableDataset[Any], Updateable):
    """Random directions; how many there are follows the step."""

    size = 1

    def update_step(self, epoch: int, global_step: int) -> None:
        self.size = 1 if global_step < 12 else 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {}

    def collate(self, batch: Any) -> dict[str, Tensor]:
        return {"directions": torch.rand(self.size) - 0.5 + 0.1 * random.random()}


def make_loader() -> DataLoader[Any]:
    dataset = Cameras()
    return DataLoader(dataset, batch_size=None, collate_fn=dataset.collate)


@register("dreamfusion-system")
class System(lightning.LightningModule, Updateable):
    """A system with its own loop by step, which the extension goes in front of."""

    def __init__(self, picard: dict[str, Any] | None = None, scheduler: Any = None) -> None:
        super().__init__()
        optimizer = Config(name="Adam", args={"lr": 2e-3}, picard=Config(picard or {}))
        self.cfg = SimpleNamespace(optimizer=optimizer, scheduler=scheduler)
        self.geometry = Encoding()
        self.renderer = Renderer(self.geometry)
        self.guidance = Guidance()
        self._resumed_eval, self._status = False, {"global_step": 0, "current_epoch": 0}

    def set_resume_status(self, epoch: int, global_step: int) -> None:
        self._resumed_eval = True
        self._status = {"current_epoch": epoch, "global_step": global_step}

    @property
    def true_global_step(self) -> int:
        return self._status["global_step"] if self._resumed_eval else self.global_step

    @property
    def true_current_epoch(self) -> int:
        return self._status["current_epoch"] if self._resumed_eval else self.current_epoch

    def preprocess_data(self, batch: Any, stage: str) -> None:
        batch["stage"] = stage

    def configure_optimizers(self) -> Any:
        return parse_optimizer(self.cfg.optimizer, self)

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> None:
        raise AssertionError("the extension replaces it")

    on_train_batch_end = on_train_batch_start  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        assert batch["stage"] == "train"
        found = self.guidance(self.renderer(), batch["directions"])
        weight = 0.2 + 0.05 * self.true_global_step
        loss = weight * found["loss_sds"] + 0.1 * quantize(self.renderer.cells).abs().sum()
        self.log("train/level", found["level"])
        self.log("train_params/weight", weight)
        return {"loss": loss}
