"""transformers' Trainer: given the wrapper, it trains and resumes as with the base, and says what it costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.frameworks.task import assert_told_once, recorded, wrap
from tests.helpers.runs import assert_same_bits

STEPS = 6


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class StopAt(TrainerCallback):
    """Ends a run as if it was cut off, after its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def make_trainer(
    folder: Path, wrapped: bool, stop: int = STEPS, **options: Any
) -> tuple[Trainer, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.1,
        )
    )
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = wrap(base) if wrapped else base
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_steps=3,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Sentences(),
        optimizers=(optimizer, scheduler),
        callbacks=[StopAt(stop)],
    )
    return trainer, optimizer


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_it_trains_as_with_the_base(options: str, tmp_path: Path) -> None:
    """Backward has run when it calls step(), so nothing runs ahead; told once, at the user's line."""
    reference, _ = make_trainer(tmp_path / "base", False, **OPTIONS[options])
    reference.train()
    trainer, optimizer = make_trainer(tmp_path / "wrapped", True, **OPTIONS[options])
    with recorded() as ours:
        trainer.train()
    assert_same_bits(weights(trainer), weights(reference))
    assert_same_bits(
        optimizer.base.state_dict()["state"], reference.optimizer.state_dict()["state"]
    )
    assert trainer.state.global_step == optimizer.step_index == STEPS
    assert_told_once(ours, __file__, "trainer.train()", "without a closure")


def test_it_resumes_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    reference, _ = make_trainer(tmp_path / "base", False)
    reference.train()
    with recorded():
        make_trainer(tmp_path / "cut", True, stop=3)[0].train()
        trainer, optimizer = make_trainer(tmp_path / "cut", True)
        trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert optimizer.step_index == STEPS
    assert_same_bits(weights(trainer), weights(reference))
