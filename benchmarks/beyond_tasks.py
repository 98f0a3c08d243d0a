"""Small everyday trainings for `beyond_3d.py`: a language model, a LoRA and a diffusion model, all made here.

What they read is on every machine, and depends on Python's version: its own help, and the source of its library.
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from peft import LoraConfig, get_peft_model
from picardopt_3d.io import replacing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from picardopt import step_rng

CONTEXT, CHARACTERS = 64, 128
"""Characters that a language model sees, and those that there are: ASCII."""
HELD_OUT = 64
"""Pieces of text, or pictures, on which a run is evaluated."""
PRETRAINING = 600
"""Steps of the Llama before its LoRA."""
PIXELS, PICTURES = 16, 512
CLIP = 1.0
"""Largest norm of a gradient."""


@dataclass
class Task:
    """A training.

    Attributes:
        bases: The optimizers.
        parameters: What they train.
        loss: A step's loss, from the step's random numbers.
        evaluate: The held-out loss.
        after_step: What the loop does after each step, if anything.
    """

    bases: list[Optimizer]
    parameters: list[Tensor]
    loss: Callable[[], Tensor]
    evaluate: Callable[[], float]
    after_step: Callable[[], object] | None = None

    def closure(self) -> Tensor:
        """A step's loss and its clipped gradients."""
        for base in self.bases:
            base.zero_grad()
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        return loss.detach()


@cache
def manual() -> Tensor:
    """The topics of Python's help."""
    return encoded("\n".join(topics[name] for name in sorted(topics)))


@cache
def source() -> Tensor:
    """The source of four modules of Python's library."""
    return encoded("\n".join(map(inspect.getsource, (argparse, inspect, typing, tarfile))))


def encoded(text: str) -> Tensor:
    """The characters of a text, those beyond ASCII left out."""
    return torch.tensor(list(text.encode("ascii", "ignore")))


def pieces(text: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Pieces at random places, each a character longer than the context."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """What is learned, and fixed pieces of the last tenth."""
    border = len(text) * 9 // 10
    return text[:border], pieces(text[border:], HELD_OUT, torch.Generator().manual_seed(1))


def next_character(logits: Tensor, piece: Tensor) -> Tensor:
    """The mean loss of the characters of pieces, each from those before it."""
    return functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())


class Block(nn.Module):
    """Attention and two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        parts = self.queries_keys_values(self.first(x)).view(count, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(count, length, width))
        hidden: Tensor = self.down(functional.gelu(self.up(self.second(x))))
        return x + hidden


class Transformer(nn.Module):
    """A transformer of characters, about 120,000 parameters."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places.weight[: characters.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def characters(seed: int, muon: bool = False) -> Task:
    """A transformer from scratch: batch 8, AdamW at 2e-3, weights decay but norms and biases do not.

    Args:
        seed: Of the first weights.
        muon: Whether the blocks' matrices have Muon, at a rate that makes steps as long as AdamW's.
    """
    torch.manual_seed(seed)
    model = Transformer()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if muon else []
    apart = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    bases: list[Optimizer] = [AdamW(groups, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))]
    if muon:
        bases.insert(0, Muon(matrices, lr=2e-3, adjust_lr_fn="match_rms_adamw"))
    learned, held_out = split(manual())

    def loss() -> Tensor:
        piece = pieces(learned, 8)
        return next_character(model(piece[:, :-1]), piece)

    @torch.no_grad()
    def evaluate() -> float:
        return float(next_character(model(held_out[:, :-1]), held_out))

    return Task(bases, list(model.parameters()), loss, evaluate)


def llama(cache_folder: Path, steps: int) -> LlamaForCausalLM:
    """A Llama of a million parameters that has learned the first half of the manual, sequentially, once."""
    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    kept = cache_folder / f"llama-{steps}.safetensors"
    if not kept.exists():
        pretrain(model, steps)
        cache_folder.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            save_file(model.state_dict(), temporary)
    model.load_state_dict(load_file(kept))
    return model


def pretrain(model: LlamaForCausalLM, steps: int) -> None:
    """The plain loop: batch 16, AdamW at 2e-3, with warm-up and decay."""
    text = manual()[: len(manual()) // 2]
    base = AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = LambdaLR(base, lambda step: min(1.0, (step + 1) / 30, 1.02 - step / steps))
    for step in range(steps):
        with step_rng(0, step):
            piece = pieces(text, 16)
        base.zero_grad()
        next_character(model(piece[:, :-1]).logits, piece).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        base.step()
        scheduler.step()


def lora(seed: int, cache_folder: Path, pretraining: int, rate: float) -> Task:
    """A LoRA of rank 8 on all linear layers, for the library's source: batch 2, AdamW, dropout 0.05."""
    model = llama(cache_folder, pretraining)
    torch.manual_seed(seed)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=layers)
    adapted: Any = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    learned, held_out = split(source())

    def loss() -> Tensor:
        piece = pieces(learned, 2)
        return next_character(adapted(input_ids=piece[:, :-1]).logits, piece)

    @torch.no_grad()
    def evaluate() -> float:
        adapted.eval()
        found = float(next_character(adapted(input_ids=held_out[:, :-1]).logits, held_out))
        adapted.train()
        return found

    adapted.train()
    return Task([AdamW(parameters, lr=rate, weight_decay=0.01)], parameters, loss, evaluate)


def shapes(count: int, generator: torch.Generator) -> Tensor:
    """Pictures of discs and squares of one color on another, [count, 3, 16, 16] in -1..1."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    grid = torch.linspace(-1, 1, PIXELS)
    places = torch.stack(torch.meshgrid(grid, grid, indexing="ij"))
    offsets = places - (drawn(2, 1, 1) - 0.5)
    sizes = 0.3 + 0.4 * drawn(1, 1)
    disc, square = offsets.square().sum(1).sqrt(), offsets.abs().amax(1)
    distance = torch.where(drawn(1, 1) < 0.5, disc, square)
    inside = ((sizes - distance) * PIXELS / 2).clamp(0, 1).unsqueeze(1)
    front, back = drawn(3, 1, 1), drawn(3, 1, 1)
    return 2 * (inside * front + (1 - inside) * back) - 1


def diffusion(seed: int) -> Task:
    """A UNet that predicts noise: batch 4, AdamW at 1e-3; the loop averages its weights, 0.98 of the past."""
    torch.manual_seed(seed)
    unet: Any = UNet2DModel(
        sample_size=PIXELS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    levels = DDPMScheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(1)
    learned, held_out = shapes(PICTURES, generator), shapes(HELD_OUT, generator)
    fixed_noise = torch.randn(held_out.shape, generator=generator)
    fixed_times = torch.arange(HELD_OUT) * len(levels) // HELD_OUT
    average: Any = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.98))

    def error(model: Any, pictures: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        level = levels[times].view(-1, 1, 1, 1)
        noised = level.sqrt() * pictures + (1 - level).sqrt() * noise
        return functional.mse_loss(model(noised, times).sample, noise)

    def loss() -> Tensor:
        pictures = learned[torch.randint(PICTURES, (4,))]
        times = torch.randint(len(levels), (4,))
        return error(unet, pictures, torch.randn_like(pictures), times)

    @torch.no_grad()
    def evaluate() -> float:
        return float(error(average, held_out, fixed_noise, fixed_times))

    parameters = list(unet.parameters())
    base = AdamW(parameters, lr=1e-3, weight_decay=0.01)
    return Task([base], parameters, loss, evaluate, lambda: average.update_parameters(unet))
