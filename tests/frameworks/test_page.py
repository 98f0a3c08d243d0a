"""The code of docs/frameworks.md runs as it is written, in a task of the reader's."""

import re
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from picardopt import ParallelPicardOptimizer, StepIndexedLoader

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*CUDA is not available.*Disabling:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*"),
]


def task() -> dict[str, Any]:
    """What the page takes for granted: data, a model and its loss."""
    torch.manual_seed(0)
    inputs = torch.randn(32, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 1)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    return {
        "torch": torch,
        "lightning": lightning,
        "ParallelPicardOptimizer": ParallelPicardOptimizer,
        "StepIndexedLoader": StepIndexedLoader,
        "train_loader": loader,
        "batches": StepIndexedLoader(loader),
        "model": model,
        "base": torch.optim.Adam(model.parameters(), lr=0.1),
        "loss_of": loss_of,
    }


def block(word: str) -> str:
    (found,) = [each for each in BLOCKS if word in each]
    return found


@torch.no_grad()
def mean_loss(names: dict[str, Any]) -> float:
    batches = names["batches"]
    losses = [names["loss_of"](names["model"], batches.batch(step)) for step in range(4)]
    return float(torch.stack(losses).mean())


def test_there_are_no_other_blocks() -> None:
    assert len(BLOCKS) == 3


def test_lightning(tmp_path: Path) -> None:
    names = task()
    exec(block("LightningModule"), names)

    class Task(names["Module"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = names["model"]

        def loss(self, batch: Any) -> torch.Tensor:
            loss: torch.Tensor = names["loss_of"](self.model, batch)
            return loss

    before = mean_loss(names)
    trainer = lightning.Trainer(
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(Task(), names["train_loader"])
    assert trainer.global_step == 20
    assert mean_loss(names) < before


def test_accelerate() -> None:
    names = task() | {"accelerator": accelerate.Accelerator(cpu=True)}
    before = mean_loss(names)
    exec(block("accelerator.prepare"), names)
    for _ in range(19):
        names["picard"].step(names["closure"])
    assert names["picard"].stats.steps == 20
    assert mean_loss(names) < before


def test_float16_by_a_constant_scale() -> None:
    names = task()
    before = mean_loss(names)
    exec(block("autocast"), names)
    for _ in range(20):
        names["optimizer"].step(names["closure"])
    assert names["optimizer"].stats.steps == 20
    assert mean_loss(names) < before
