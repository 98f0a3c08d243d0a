"""Compares DreamGaussian's own loop with the adapter's, on the CPU, at a tiny size.

    git clone https://github.com/dreamgaussian/dreamgaussian ../dreamgaussian && pip install omegaconf
    python -m integrations.adapters.dreamgaussian.prove ../dreamgaussian

runs main.py of the commit below, unmodified, with each step under its own randomness, and main.py with
`dreamgaussian.diff`: at tolerance 0 in one process and in two, and with the default tolerance; then the former with
another seed. README.md says what stands for the compiled extensions and for the diffusion model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from integrations.adapters.on_cpu import compare
from integrations.adapters.on_cpu.cuda_on_cpu import cuda_on_cpu
from picardopt import step_rng

HERE = Path(__file__).resolve().parent
MODULE = "integrations.adapters.dreamgaussian.prove"
COMMIT = "69a3c7065d580da124dc0bf2e9a21cd3b7973b35"
NOT_CALLED = ("cv2", "rembg", "dearpygui", "dearpygui.dearpygui", "kiui", "pymeshlab")
"""What DreamGaussian imports and this trial never calls."""
SETTINGS = """
prompt: a blue chair
mvdream: True
iters: 500
num_pts: 300
radius: 1.65
fovy: 42.5
density_end_iter: 60
densification_interval: 10
opacity_reset_interval: 15
densify_grad_threshold: 0.02
"""
"""What differs from configs/text.yaml."""
STATISTICS = ("max_radii2D", "xyz_gradient_accum", "denom")


def checkout(clone: Path, folder: Path, *, patched: bool) -> Path:
    """Puts the commit's files into a folder, with the diff and the adapter if asked."""
    compare.checkout(clone, COMMIT, ["*.py", "guidance", "configs"], folder)
    if patched:
        subprocess.run(["git", "apply", HERE / "dreamgaussian.diff"], cwd=folder, check=True)
        (folder / "picard_loop.py").write_text((HERE / "picard_loop.py").read_text())
    return folder


def install_stand_ins() -> None:
    """Registers what stands for compiled extensions and for the diffusion model."""
    stand_ins = HERE / "on_cpu"
    compare.load("diff_gaussian_rasterization", stand_ins / "diff_gaussian_rasterization.py")
    sys.modules["simple_knn"] = types.ModuleType("simple_knn")
    compare.load("simple_knn._C", stand_ins / "simple_knn.py")
    sys.modules["guidance"] = types.ModuleType("guidance")
    compare.load("guidance.mvdream_utils", stand_ins / "mvdream_utils.py")


def train(folder: Path, steps: int, *, seed: int, picard: dict[str, Any] | None) -> dict[str, Any]:
    """Takes steps with the main.py of a folder; None: with the unmodified one, each under its own randomness."""
    from omegaconf import OmegaConf

    install_stand_ins()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with compare.missing(NOT_CALLED):
        import main
    opt = OmegaConf.merge(OmegaConf.load("configs/text.yaml"), OmegaConf.create(SETTINGS))
    with cuda_on_cpu():
        if picard is None:
            np.random.seed(0)
            torch.manual_seed(0)
        else:
            opt.picard = picard
            main.picard_loop.start()
        gui = main.GUI(opt)
        gui.prepare_train()
        for step in range(steps):
            if picard is not None:
                gui.train_step()
                continue
            with step_rng(seed, step):
                gui.train_step()
    gaussians = gui.renderer.gaussians
    gaussians.update_learning_rate(
        steps + 1
    )  # what the next step would do, and the adapter has done
    optimizer = gaussians.optimizer
    result = {
        "parameters": {g["name"]: g["params"][0].detach() for g in optimizer.param_groups},
        "state": [optimizer.state[g["params"][0]] for g in optimizer.param_groups],
        "rates": [float(g["lr"]) for g in optimizer.param_groups],
        "statistics": {name: getattr(gaussians, name) for name in STATISTICS},
        "says": f"{len(gaussians.get_xyz)} Gaussians",
    }
    if picard is None:
        return result
    return {**result, "strides": gui.optimizer.stats.strides}


def checkouts(clone: Path, scratch: Path) -> tuple[Path, Path]:
    """Returns the folders of the unmodified code and of the changed one."""
    original = checkout(clone, scratch / "original", patched=False)
    return original, checkout(clone, scratch / "changed", patched=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        compare.child(train, *sys.argv[2:])
    else:
        compare.prove(MODULE, __doc__.splitlines()[0], checkouts)
