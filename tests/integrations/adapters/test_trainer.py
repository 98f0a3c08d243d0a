"""PicardTrainer: the Trainer's own run, bit for bit, evaluated ahead of time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from integrations.adapters.transformers.picard_trainer import PicardTrainer
from tests.frameworks.test_trainer import StopAt
from tests.helpers.accelerated import forget
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.adapters.quantized import quantized

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings(  # called by peft
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),
]


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Thirteen, of which some tokens do not count."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(32, (8,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: index % 4] = -100
        return {"input_ids": tokens, "labels": labels}


def make(folder: Path, kind: Any = PicardTrainer, stop: int = 100, **options: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    if options.pop("lora", False):
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, lora)
    if options.pop("quantized", False):
        model.requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        quantized(model)
    picard = {"picard": options.pop("picard")} if "picard" in options else {}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(**(settings | options))
    return kind(
        model=model, args=arguments, train_dataset=Sentences(), callbacks=[StopAt(stop)], **picard
    )


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a LoRA": {"lora": True},
    "accumulation": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3},
    "no clipping": {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 3},
    "bfloat16": {"bf16": True},
    "a quantized layer": {"quantized": True},
}


SLOW = ("plain", "no clipping", "bfloat16")


@pytest.mark.parametrize(
    "options",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OPTIONS],
)
def test_at_tolerance_0_it_is_the_trainers_own_run(options: str, tmp_path: Path) -> None:
    """Nothing is random in these steps, so the bits are those of the plain Trainer, and so is what it logs."""
    reference = make(tmp_path, Trainer, **OPTIONS[options])
    reference.train()
    trainer = make(tmp_path, picard={"window": 4, "tolerance": 0}, **OPTIONS[options])
    trainer.train()
    assert_same_bits(weights(trainer), weights(reference))
    logged, expected = trainer.state.log_history[:-1], reference.state.log_history[:-1]
    assert logged == expected
    assert trainer.picard.step_index == trainer.state.global_step == reference.state.global_step
    assert trainer.picard.stats.outer_changes == 0
    if "quantized" in OPTIONS[options]:
        assert trainer.picard.stats.sweeps < trainer.picard.stats.steps


def test_at_the_default_tolerance_it_takes_fewer_sweeps(tmp_path: Path) -> None:
    trainer = make(tmp_path, picard={"window": 4})
    trainer.train()
    assert trainer.picard.stats.steps == 14
    assert trainer.picard.stats.sweeps < 14


def test_it_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """In the middle of an epoch, with another window."""
    reference = make(tmp_path / "whole", Trainer)
    reference.train()
    saving = {"save_strategy": "steps", "save_steps": 5}
    make(tmp_path / "cut", picard={"window": 4, "tolerance": 0}, stop=5, **saving).train()
    trainer = make(tmp_path / "cut", picard={"window": 3, "tolerance": 0}, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert trainer.picard.step_index == 14
    assert_same_bits(weights(trainer), weights(reference))


def test_it_trains_on_when_asked_again(tmp_path: Path) -> None:
    trainer = make(tmp_path, picard={"window": 4}, max_steps=3)
    trainer.train()
    picard = trainer.picard
    trainer.train()
    assert trainer.picard is picard


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    trainer = make(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="iterable"):
        PicardTrainer(model=trainer.model, args=trainer.args, train_dataset=Stream())


def on_a_rank(folder: Path) -> tuple[list[Tensor], float, int]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in places.items()}):
        trainer = make(folder, picard={"tolerance": 0})
        trainer.train()
        size = trainer.args.world_size
        forget()
        return weights(trainer), trainer.picard.stats.mean_stride, size


@pytest.mark.slow
def test_processes_share_the_window_and_not_the_batch(pools: Pools, tmp_path: Path) -> None:
    reference = make(tmp_path, Trainer)
    reference.train()
    for got, stride, size in pools(2).run(on_a_rank, tmp_path):
        assert size == 2
        assert_same_bits(got, weights(reference))
        assert stride >= 1
