"""Writes what the adapters' checks need: tiny models with random weights, as the hub has them, and data to train on.

A pipeline and pictures of one thing; a language model, a LoRA, questions and instructions; or a text file where
Lightning's WikiText2 looks for it::

    python -m integrations.adapters.tiny stable-diffusion FOLDER
    python -m integrations.adapters.tiny llama FOLDER
    python -m integrations.adapters.tiny text FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch


def stable_diffusion(folder: Path) -> None:
    """Writes FOLDER/model, a StableDiffusionPipeline of 16 pixels, and FOLDER/images, five pictures of 24 pixels."""
    from PIL import Image

    from tests.integrations.helpers.tiny_pipelines import save_stable_diffusion

    save_stable_diffusion(folder / "model")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    thing = torch.rand(3, 6, 6, generator=generator)
    for index in range(5):
        picture = torch.nn.functional.interpolate(thing[None], size=(24, 24), mode="bilinear")[0]
        picture = (picture + 0.1 * torch.randn(3, 24, 24, generator=generator)).clamp(0, 1)
        pixels = (255 * picture).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")


def llama(folder: Path) -> None:
    """Writes FOLDER/model (a small Llama that reads bytes), FOLDER/lora, FOLDER/gsm8k and FOLDER/alpaca."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder / "model")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    get_peft_model(model, lora).save_pretrained(folder / "lora")
    sums = [(a, b) for a in range(2, 12) for b in range(2, 12)]
    lines = [
        {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}. #### {a + b}"}
        for a, b in sums
    ]
    (folder / "gsm8k").mkdir()
    for name, part in (("train", lines[:-4]), ("test", lines[-4:])):
        (folder / "gsm8k" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (folder / "alpaca").mkdir()
    rows = [{"instruction": r["question"], "output": r["answer"]} for r in lines]
    (folder / "alpaca" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def text(folder: Path) -> None:
    """Writes FOLDER/data/wikitext-2.txt: words of Python's language reference, for three batches an epoch."""
    (folder / "data").mkdir(parents=True)
    words = "\n".join(topics.values()).split()[:3000]
    needed = 35 * (4000 + 2 * 20 + 2)  # pieces for validation and test, and batches of 20
    words = (words * (needed // len(words) + 1))[:needed]
    lines = [
        " ".join(words[i : i + 20]) for i in range(0, 20 * needed // 21, 20)
    ]  # each ends with one more
    (folder / "data" / "wikitext-2.txt").write_text("\n".join(lines))


def main() -> None:
    """Reads the arguments."""
    makers = {"stable-diffusion": stable_diffusion, "llama": llama, "text": text}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    makers[sys.argv[1]](folder)


if __name__ == "__main__":
    main()
