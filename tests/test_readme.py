"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_train(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    block = next(block for block in blocks if "for step in range" in block)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    optimizer = names["optimizer"]
    assert optimizer.stats.steps == 200
    assert optimizer.stats.sweeps < 100
    assert float(names["loss"]) < 0.5  # about 1.6 at the start
    assert "steps per sweep" in capsys.readouterr().out


def test_the_files_that_it_names_are_there():
    text = README.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    named = re.findall(r"`((?:picardopt|integrations|benchmarks|tests|docs)/[\w./]*)`", text)
    assert links + named
    for path in links + named:
        assert (README.parent / path).exists(), path
