"""Each example, as its head says to start it, for a few steps: it learns, and more than one step a sweep."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.helpers.versions import needs_3d, needs_package

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(group) for group in found.groups()]


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def assert_ran_ahead(text: str, steps: int) -> None:
    ran, sweeps, stride = numbers(r"(\d+) (?:steps )?in (\d+) sweeps \((.*) steps a sweep\)", text)
    assert ran == steps
    assert sweeps < 0.75 * steps
    assert stride == pytest.approx(steps / sweeps, abs=0.06)


def load(name: str) -> ModuleType:
    """An example as a module, to run it without another process."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # its annotations are looked up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "on", ["one process", pytest.param("two processes", marks=pytest.mark.slow)]
)
@needs_package("tyro")
def test_image_fitting(on: str, tmp_path: Path) -> None:
    out = tmp_path / "fitted.png"
    before = TORCHRUN if on == "two processes" else []
    text = start(
        *before,
        str(EXAMPLES / "image_fitting.py"),
        "--steps",
        "150",
        "--size",
        "48",
        "--out",
        str(out),
    )
    assert_ran_ahead(text, 150)
    assert numbers(r"([\d.]+) dB", text)[0] > 14  # 8.9 for a grey picture
    assert size_of(out) == (48, 48)


@needs_3d
def test_gaussian_fitting(tmp_path: Path) -> None:
    out = tmp_path / "fitted.png"
    text = start(
        str(EXAMPLES / "gaussian_fitting.py"), "--steps", "120", "--size", "32", "--out", str(out)
    )
    assert_ran_ahead(text, 120)
    quality, count = numbers(r"([\d.]+) dB with (\d+) Gaussians", text)
    assert quality > 13
    assert count > 100
    assert size_of(out) == (32, 32)


@pytest.mark.slow
@needs_3d
def test_score_distillation(tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    text = start(str(EXAMPLES / "score_distillation.py"), "--steps", "40", "--out", str(out))
    assert_ran_ahead(text, 40)
    drawn, grey = numbers(r"([\d.]+) dB to the true views \(grey: ([\d.]+)\)", text)
    assert drawn > grey + 4
    assert size_of(out) == (256, 128)


@pytest.mark.slow
@needs_package("tyro")
def test_finetune_llama() -> None:
    text = start(str(EXAMPLES / "finetune_llama.py"), "--steps", "30", "--width", "32")
    assert_ran_ahead(text, 30)
    before, after = numbers(r"loss ([\d.]+) -> ([\d.]+) nats", text)
    assert before == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)
    assert after < before - 0.3


@needs_package("tyro")
def test_finetune_llama_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut and gone on with another window: bit for bit the run that was not, at tolerance 0."""
    example = load("finetune_llama")
    files = [tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"]
    runs = [(files[0], 10, 4), (files[1], 6, 4), (files[1], 10, 3)]
    for file, steps, window in runs:
        example.main(
            example.Config(steps=steps, window=window, tolerance=0, width=16, checkpoint=file)
        )
    assert "steps 6 to 10 in" in capsys.readouterr().out
    whole, cut = (example.load_checkpoint(file) for file in files)
    assert whole["optimizer"]["picard"]["step"] == cut["optimizer"]["picard"]["step"] == 10
    assert whole["model"].keys() == cut["model"].keys()
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
