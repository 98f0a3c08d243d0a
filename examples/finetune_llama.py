"""A small Llama that learns a text byte by byte, and continues from a checkpoint.

The model is transformers' own `LlamaForCausalLM`, made from a configuration; the text is Python's language reference,
which comes with Python, or a file of yours. `StepIndexedLoader` gives the batches of an ordinary shuffling DataLoader
by step, so that a step can be evaluated ahead of time. With `--checkpoint` a run saves at its end, and the next one
continues from there, with any other `--window` or number of processes.

    python examples/finetune_llama.py --steps 200 --checkpoint run.ckpt
    torchrun --nproc-per-node 4 examples/finetune_llama.py --steps 300 --checkpoint run.ckpt
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from picardopt import (
    ParallelPicardOptimizer,
    StepIndexedLoader,
    load_checkpoint,
    save_checkpoint,
)


@dataclass(frozen=True)
class Config:
    """What is learnt and how.

    Attributes:
        text: A file; Python's language reference if none is given.
        steps: Optimizer steps of the whole run, those before the checkpoint included.
        window: Steps evaluated per sweep; None is one per process.
        tolerance: None is picardopt's default; 0 is the sequential run, bit for bit.
        rate: Learning rate after a warm-up of 20 steps.
        batch: Sequences per step.
        length: Bytes per sequence.
        width: Of the model.
        layers: Of the model.
        seed: Of the run.
        checkpoint: A file; loaded if it is there, and written at the end.
    """

    text: Path | None = None
    steps: int = 200
    window: int | None = 8
    tolerance: float | None = None
    rate: float = 5e-4
    batch: int = 4
    length: int = 64
    width: int = 64
    layers: int = 2
    seed: int = 0
    checkpoint: Path | None = None


def read_excerpts(config: Config) -> tuple[Tensor, Tensor]:
    """Returns sequences of bytes to learn from, and every 16th to evaluate on (32 at most). [count, length] each."""
    text = "\n".join(topics.values()) if config.text is None else config.text.read_text()
    tokens = torch.tensor(list(text.encode()))
    rows = tokens[: len(tokens) // config.length * config.length].view(-1, config.length)
    held_out = torch.arange(len(rows)) % 16 == 0
    return rows[~held_out], rows[held_out][:32]


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    """Returns the mean loss over excerpts, nats per byte."""
    return float(model(input_ids=rows, labels=rows).loss)


def main(config: Config) -> None:
    """Trains and prints the losses."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group()
    excerpts, held_out = read_excerpts(config)
    loader = DataLoader(TensorDataset(excerpts), config.batch, shuffle=True, drop_last=True)
    batches = StepIndexedLoader(loader, seed=config.seed)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            max_position_embeddings=config.length,
        )
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate)
    optimizer = ParallelPicardOptimizer(
        optimizer,
        window=config.window,
        tolerance=config.tolerance,
        total_steps=config.steps,
        seed=config.seed,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 20))
    optimizer.lr_scheduler = scheduler  # so that it knows the rates of future steps
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if config.checkpoint is not None and config.checkpoint.exists():
        saved = load_checkpoint(config.checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    first, before = optimizer.step_index, evaluate(model, held_out)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        (rows,) = batches.batch(step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    for _ in range(first, config.steps):
        optimizer.step(closure)
        scheduler.step()

    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        stats = optimizer.stats
        print(
            f"held-out loss {before:.3f} -> {evaluate(model, held_out):.3f} nats a byte, steps {first} to "
            f"{optimizer.step_index} in {stats.sweeps} sweeps ({stats.mean_stride:.1f} steps a sweep)"
        )
        if config.checkpoint is not None:
            save_checkpoint(
                config.checkpoint, {name: part.state_dict() for name, part in parts.items()}
            )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
