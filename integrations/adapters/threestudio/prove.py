"""Compares threestudio's own steps with those of the extension, on the CPU, at a tiny size.

    git clone https://github.com/threestudio-project/threestudio ../threestudio && pip install omegaconf nerfacc
    python -m integrations.adapters.threestudio.prove ../threestudio

runs the system, the data and the configuration (configs/dreamfusion-sd.yaml, made small) of the commit below,
unmodified: once step by step, each under its own randomness, without Lightning's loop; and with `system_type` changed,
by Lightning's trainer, at tolerance 0 in one process and in two, and with the default tolerance; then the former with
another seed. README.md says what stands for the packages that need CUDA and for the diffusion model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from integrations.adapters.on_cpu import compare
from integrations.adapters.on_cpu.cuda_on_cpu import cuda_on_cpu
from picardopt import step_rng

HERE = Path(__file__).resolve().parent
MODULE = "integrations.adapters.threestudio.prove"
COMMIT = "28d9d80d9d00f308244adfcf3be8b17ca0cb6465"
NOT_CALLED = (
    *("cv2", "nvdiffrast", "nvdiffrast.torch", "envlight", "igl", "controlnet_aux", "wandb"),
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
    *("IPython", "IPython.display"),
)
"""What threestudio imports and this trial never calls."""
LOOK_FOR_OTHERS = ("diffusers", "pytorch_lightning", "torchmetrics", "transformers", "wandb")
"""What looks for some of these itself: imported while nothing stands for them."""
SETTINGS = [
    *("name=trial", "tag=trial", "use_timestamp=false"),
    *("data.batch_size=2", "data.width=16", "data.height=16"),
    *("data.camera_distance_range=[1.5,1.8]", "data.fovy_range=[40,45]"),
    *("data.camera_perturb=0", "data.center_perturb=0", "data.up_perturb=0"),
    "system.geometry.radius=0.6",
    *("system.geometry.density_blob_scale=10", "system.geometry.density_blob_std=0.3"),
    *(
        f"system.geometry.pos_encoding_config.{name}"
        for name in ("n_levels=6", "log2_hashmap_size=12", "base_resolution=4", "start_level=3")
    ),
    *(
        f"system.geometry.pos_encoding_config.{name}"
        for name in ("start_step=6", "update_steps=5", "per_level_scale=1.6")
    ),
    *("system.material.ambient_only_steps=10", "system.renderer.num_samples_per_ray=24"),
    *(
        "system.prompt_processor_type=shipped-prompt-processor",
        "system.guidance_type=shipped-guidance",
    ),
    "system.prompt_processor.prompt=a blue chair",
    *("system.guidance.guidance_scale=3.0", "system.guidance.max_step_percent=[0,0.98,0.5,40]"),
    "system.loss.lambda_orient=[0,0.1,1.0,30]",
    "trainer.precision=32",
]
"""What differs from configs/dreamfusion-sd.yaml: sizes, schedules that change within the trial, and the model."""


def checkout(clone: Path, folder: Path) -> Path:
    """Puts the commit's files into a folder, and the extension into `custom/`."""
    compare.checkout(clone, COMMIT, ["threestudio", "configs", "launch.py", "extern"], folder)
    shutil.copytree(HERE / "threestudio-picardopt", folder / "custom" / "threestudio-picardopt")
    return folder


def install_stand_ins() -> None:
    """Registers what stands for compiled extensions."""
    compare.load("tinycudann", HERE / "on_cpu" / "tinycudann.py")
    compare.load("nerfacc_kernels", HERE / "on_cpu" / "nerfacc_kernels.py").install()


def train(folder: Path, steps: int, *, seed: int, picard: dict[str, Any] | None) -> dict[str, Any]:
    """Takes steps; without options of picardopt by threestudio's system alone, each under its own randomness."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with cuda_on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        install_stand_ins()
        for name in filter(importlib.util.find_spec, LOOK_FOR_OTHERS):
            importlib.import_module(name)
        import launch

        with compare.missing(NOT_CALLED):
            import threestudio
        from threestudio.utils.config import load_config

        compare.load("shipped_guidance", HERE / "on_cpu" / "guidance.py")
        launch.load_custom_modules()
        options = [
            f"system.optimizer.picard.{key}={value}" for key, value in (picard or {}).items()
        ]
        if picard:
            options.append("system_type=dreamfusion-system:picard")
        cfg = load_config("configs/dreamfusion-sd.yaml", cli_args=[*SETTINGS, *options], n_gpus=1)
        torch.manual_seed(0)
        data = threestudio.find(cfg.data_type)(cfg.data)
        system = threestudio.find(cfg.system_type)(cfg.system)
        strides = by_trainer(system, data, steps) if picard else by_hand(system, data, steps, seed)
    optimizer = system.optimizers().optimizer.base if picard else system.base
    result = {
        "parameters": {name: p.detach() for name, p in system.named_parameters()},
        "state": [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]],
        "occupancy": [system.renderer.estimator.occs, system.renderer.estimator.binaries],
        "mask": system.geometry.encoding.encoding.mask,
        "says": f"{int(system.renderer.estimator.binaries.sum())} of 32768 cells occupied",
    }
    return {**result, "strides": strides} if picard else result


def by_hand(system: Any, data: Any, steps: int, seed: int) -> None:
    """Takes steps as threestudio does, in its order: updates, batch, loss, gradients, optimizer."""
    from threestudio.utils.base import update_if_possible

    data.setup("fit")
    dataset = data.train_dataset
    system.train()
    system.base = optimizer = system.configure_optimizers()["optimizer"]
    system.on_fit_start()
    for step in range(steps):
        with step_rng(seed, step):
            system.set_resume_status(0, step)  # what the system takes for the present step
            update_if_possible(dataset, 0, step)
            system.do_update_step(0, step)
            batch = dataset.collate(next(iter(dataset)))
            optimizer.zero_grad()
            system.training_step(batch, step)["loss"].backward()
            optimizer.step()
            system.do_update_step_end(0, step)


def by_trainer(system: Any, data: Any, steps: int) -> list[int]:
    """Takes steps by Lightning's trainer, as launch.py does, on the CPU; returns the strides."""
    import pytorch_lightning

    trainer = pytorch_lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        inference_mode=False,
    )
    trainer.fit(system, datamodule=data)
    strides: list[int] = system.optimizers().optimizer.stats.strides
    return strides


def checkouts(clone: Path, scratch: Path) -> tuple[Path, Path]:
    """Returns one folder twice: the extension changes no file."""
    folder = checkout(clone, scratch / "threestudio")
    return folder, folder


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        compare.child(train, *sys.argv[2:])
    else:
        compare.prove(MODULE, __doc__.splitlines()[0], checkouts)
