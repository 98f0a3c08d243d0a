"""The loops of the adapters' diffs with the real libraries: small models, the same calls, the same bits."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from lightning.pytorch.demos import Transformer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from integrations.adapters.check import Run, parameters_of, watched
from integrations.adapters.diffusers import sds
from picardopt import ParallelPicardOptimizer, StepIndexedLoader
from tests.integrations.adapters.quantized import quantized
from tests.integrations.helpers.tiny_pipelines import latent_unet, save_stable_diffusion

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # by peft
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def ways(
    train: Callable[[type[ParallelPicardOptimizer]], ParallelPicardOptimizer],
    *,
    quantizes: bool = True,
) -> None:
    """Trains one step after the other, and ahead at tolerance 0, and compares; then as it is."""
    found: dict[str, Run] = {}
    for way in ("in order", "tolerance 0", "as it is"):
        optimizer = train(watched(way, None, []))
        run = found[way] = optimizer.run  # type: ignore[attr-defined]
        run.parameters = [p.detach().clone() for p in parameters_of(optimizer)]
        run.sweeps = optimizer.stats.sweeps
    order, exact, free = found.values()
    assert any(not torch.equal(a, b) for a, b in zip(order.parameters, order.initial, strict=True))
    assert exact.same(order)
    assert not quantizes or exact.sweeps < len(exact.losses)
    assert free.sweeps < len(free.losses) == len(order.losses)


def test_a_lora_of_a_unet_with_accelerate() -> None:
    """As train_dreambooth_lora.diff: two batches a step, clipping, a schedule, dropout."""

    def train(kind: type[ParallelPicardOptimizer]) -> ParallelPicardOptimizer:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        unet: UNet2DConditionModel = latent_unet().requires_grad_(False)
        unet.add_adapter(LoraConfig(r=2, lora_dropout=0.1, target_modules=["to_q", "to_v"]))
        trained = quantized(unet)
        noise_scheduler = DDPMScheduler()
        dataset = TensorDataset(torch.randn(6, 4, 8, 8), torch.randn(6, 3, 16))
        train_dataloader = DataLoader(dataset, 2, shuffle=True)
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-3)
        picard = optimizer = kind(optimizer, window=4, total_steps=8)
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=8)
        unet = accelerator.prepare_model(unet, evaluation_mode=True)
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
        picard.lr_scheduler = lr_scheduler
        batches = StepIndexedLoader(train_dataloader)
        unet.train()
        for _ in range(8):

            def backward(batch: Any) -> Tensor:
                latents, text = batch
                noise = torch.randn_like(latents)
                level = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (len(latents),)
                )
                noisy = noise_scheduler.add_noise(latents, noise, level)
                found = unet(noisy, level, text, return_dict=False)[0]
                loss = F.mse_loss(found.float(), noise.float())
                accelerator.backward(loss)
                return loss.detach()

            def closure(step: int) -> Tensor:
                optimizer.zero_grad()
                for micro_step in range(2):
                    batch = batches.batch(step * 2 + micro_step)
                    loss = backward(send_to_device(batch, accelerator.device))
                accelerator.clip_grad_norm_(trained, 1.0)
                return loss

            picard.step(closure)
            lr_scheduler.step()
        assert lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
        assert picard.stats.outer_changes == 0
        return picard

    ways(train)


def test_a_lora_of_a_llama() -> None:
    """As train_gsm8k_llama.diff."""

    def train(kind: type[ParallelPicardOptimizer]) -> ParallelPicardOptimizer:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
        )
        model = get_peft_model(LlamaForCausalLM(config), lora)
        trained = quantized(model)
        batches = StepIndexedLoader(DataLoader(torch.randint(32, (12, 8)), 2, shuffle=True))
        picard = optimizer = kind(torch.optim.AdamW(trained, lr=1e-3), window=4)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare(optimizer)

        def closure(step: int) -> Tensor:
            optimizer.zero_grad()
            rows = batches.batch(step)
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            return loss.detach().float()

        for _ in range(12):
            picard.step(closure)
        return picard

    ways(train)


class LanguageModel(lightning.LightningModule):
    """As transformer.diff."""

    def __init__(self, kind: type[ParallelPicardOptimizer], train_dataloader: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = StepIndexedLoader(train_dataloader)
        self.model = Transformer(vocab_size=20, ninp=8, nhid=8, nlayers=1)
        quantized(self.model)
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()

        def closure(step: int) -> Tensor:
            optimizer.zero_grad()
            input, target = self.transfer_batch_to_device(self.batches.batch(step), self.device, 0)
            output = self.model(input, target)
            loss = F.nll_loss(output, target.view(-1))
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="norm")
            return loss

        loss: Tensor = optimizer.step(closure)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.kind(torch.optim.SGD(self.parameters(), lr=0.01), window=4)


def test_a_lightning_module(tmp_path: Path) -> None:
    def train(kind: type[ParallelPicardOptimizer]) -> ParallelPicardOptimizer:
        torch.manual_seed(0)
        rows = torch.randint(20, (12, 6))
        loader = DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), 2, shuffle=True)
        model = LanguageModel(kind, loader)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, loader)
        assert trainer.global_step == 12
        optimizer: Any = model.optimizers(use_pl_optimizer=False)
        return optimizer

    ways(train)


def test_score_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_stable_diffusion(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sds.py", str(tmp_path), "--steps", "10", "--window", "4"])

    def train(kind: type[ParallelPicardOptimizer]) -> ParallelPicardOptimizer:
        made: list[ParallelPicardOptimizer] = []

        def make(*arguments: Any, **options: Any) -> ParallelPicardOptimizer:
            made.append(kind(*arguments, **options))
            return made[-1]

        monkeypatch.setattr("picardopt.ParallelPicardOptimizer", make)
        sds.main()
        assert "10 steps in" in capsys.readouterr().out
        return made[0]

    ways(train, quantizes=False)
