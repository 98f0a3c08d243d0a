"""The command `picardopt doctor`: what is installed, which devices there are, which models can be used.

Nothing is loaded unless asked for, so that it answers within seconds on a machine where something is wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from picardopt_3d.cli_errors import options_of
from picardopt_3d.models import MODELS, WEIGHTS, ModelKind, Published, kind_of, named

State = Literal["ok", "absent", "broken"]

_PURPOSES = {
    "torch": "everything",
    "diffusers": "diffusion models",
    "transformers": "text and image encoders, CLIP",
    "tokenizers": "their tokenizers",
    "huggingface-hub": "downloads of models",
    "safetensors": "files of weights and scenes",
    "peft": "LoRA of variational score distillation",
    "tyro": "command lines",
    "tqdm": "progress bars",
    "pillow": "pictures",
    "matplotlib": "plots",
    "imageio": "films",
    "imageio-ffmpeg": "films",
}
_OPTIONAL = {
    "accelerate": "CPU offload of large models; peft needs it",
    "nerfacc": "ray marching on CUDA, for scenes of your own",
    "gsplat": "rasterized Gaussians on CUDA, for scenes of your own",
}


_ELSEWHERE = (
    "where the hub cannot be reached: `hf download ID --local-dir DIR` on a machine that reaches it, and give DIR "
    "in place of the id"
)


@dataclass(frozen=True)
class Doctor:
    """Options of `picardopt doctor`.

    Attributes:
        load: Load each shipped model too.
        offline: Do not ask the hub which models could be downloaded.
    """

    load: bool = False
    offline: bool = False


class Finding(NamedTuple):
    """One line of the report."""

    state: State
    name: str
    detail: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The arguments after `picardopt doctor`; None: those of the process.

    Raises:
        SystemExit: 1 if the shipped path does not work; 2 for arguments that cannot be used.
    """
    described = "Tell what is installed, which devices there are and which models can be used."
    options = options_of(Doctor, "doctor", argv, described)
    packages = required_packages()
    shipped = shipped_models()
    if options.load and all(found.state == "ok" for found in packages):
        shipped = [loaded(found) if found.state == "ok" else found for found in shipped]
    _print("packages", [*packages, *optional_packages()])
    if _installed("torch"):
        _print("devices", devices())
    _print("shipped models", shipped)
    if _installed("huggingface-hub"):
        _print("models of the hub", hub_models(options.offline))
        print(f"  ({_ELSEWHERE})")
    wrong = [found.name for found in [*packages, *shipped] if found.state != "ok"]
    if wrong:
        print(f"\nthe shipped path does not work: see {', '.join(wrong)} above")
        raise SystemExit(1)
    print('\nthe shipped path works: `picardopt text-to-3d "a red cube" --out DIR`')


def _print(title: str, findings: Iterable[Finding]) -> None:
    found = list(findings)
    width = max(len(one.name) for one in found)
    print(f"{title}\n" + "\n".join(f"  {s:<6}  {n:<{width}}  {d}" for s, n, d in found), flush=True)


# -- packages -------------------------------------------------------------------------------------------


def required_packages() -> list[Finding]:
    """Both distributions' requirements, torch first, and whether torchvision stands in the way."""
    found = {}
    for distribution in ("picardopt", "picardopt-3d"):
        for text in metadata.requires(distribution) or [] if _installed(distribution) else []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if "extra" not in str(requirement.marker) and name != "picardopt":
                found[name] = _package(requirement)
    order = {name: place for place, name in enumerate(_PURPOSES)}
    packages = [found[name] for name in sorted(found, key=lambda n: order.get(n, len(order)))]
    if not packages:
        remedy = "not installed: pip install picardopt-3d (or `make env` in a clone)"
        return [Finding("broken", "picardopt-3d", remedy)]
    return [*packages, *_torchvision()]


def optional_packages() -> list[Finding]:
    """What is used if it is there."""
    return [
        Finding("ok" if version else "absent", name, f"{version or '-'}: {purpose}")
        for name, purpose in _OPTIONAL.items()
        for version in [_installed(name)]
    ]


def _package(requirement: Requirement) -> Finding:
    name = canonicalize_name(requirement.name)
    version, purpose = _installed(name), _PURPOSES.get(name, "needed by picardopt")
    if not version:
        remedy = f'missing ({purpose}): pip install "{name}{requirement.specifier}"'
        return Finding("broken", name, remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        remedy = f'{version} does not fit ({purpose}): pip install "{name}{requirement.specifier}"'
        return Finding("broken", name, remedy)
    return Finding("ok", name, f"{version}: {purpose}")


def _torchvision() -> list[Finding]:
    """A torchvision built for another torch: transformers, diffusers and peft then fail to import."""
    version = _installed("torchvision")
    if not version:
        return []
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        remedy = (
            f"{version} does not import ({_first_line(error)}), and then diffusers and transformers do not: "
            "pip uninstall torchvision, or install the one made for this torch"
        )
        return [Finding("broken", "torchvision", remedy)]
    return [Finding("ok", "torchvision", f"{version}: not needed here")]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# -- devices --------------------------------------------------------------------------------------------


def devices() -> list[Finding]:
    """The CPU, each accelerator, and how many processes they feed."""
    import torch

    cores = len(os.sched_getaffinity(0))
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    cpu = f"{cores} core(s), {_gib(free)} of {_gib(total)} GiB free; {platform.machine()}"
    found = [Finding("ok", "cpu", f"{cpu}; backend {_backend('cpu')}")]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind else 0
    if kind is not None:
        found += [_accelerator(kind.type, index) for index in range(count)]
    if not count:
        why = "built without CUDA or ROCm" if not torch.backends.cuda.is_built() else "no driver"
        found.append(Finding("absent", "accelerator", f"none that this torch sees ({why})"))
    processes = count or cores
    hint = "one a device" if count else "one a core; their speed is not that of devices"
    detail = f"torchrun --nproc-per-node {processes} at most: {hint}"
    return [*found, Finding("ok", "processes", detail)]


def _accelerator(kind: str, index: int) -> Finding:
    import torch

    name = f"{kind}:{index}"
    try:
        module = getattr(torch, kind)
        title = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
        memory = "memory not told"
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(index)
            memory = f"{_gib(free)} of {_gib(total)} GiB free"
    except Exception as error:  # a driver that is there and does not work
        return Finding("broken", name, f"does not answer: {_first_line(error)}")
    return Finding("ok", name, f"{title}, {memory}; backend {_backend(kind)}")


def _backend(kind: str) -> str:
    """What joins processes on such devices."""
    import torch.distributed as dist

    if not dist.is_available():
        return "none: this torch has no torch.distributed"
    backend = dist.Backend.default_device_backend_map.get(kind)
    if backend is None or not dist.is_backend_available(backend):
        return "none in this torch: one process only"
    return backend


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


# -- models ---------------------------------------------------------------------------------------------


def shipped_models() -> list[Finding]:
    """Whether each shipped model is whole."""
    folders = {WEIGHTS / "text-to-view", *(x for x in WEIGHTS.glob("*") if x.is_dir())}
    return [_shipped_model(folder) for folder in sorted(folders)]


def _shipped_model(folder: Path) -> Finding:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing = missing_parts(folder)
    if missing:
        remedy = f"lacks {', '.join(missing)} in {folder}: install picardopt-3d again"
        return Finding("broken", folder.name, remedy)
    return Finding("ok", folder.name, f"{size / 1e6:.1f} MB; {_class_name(folder)}")


def missing_parts(folder: Path) -> list[str]:
    """Parts of a model folder that its index names and that are not there.

    Args:
        folder: A pipeline folder in diffusers' layout, or that of one transformers model.
    """
    index = folder / "model_index.json"
    if not index.exists():
        return [] if _whole(folder) else ["model_index.json, or config.json and weights"]
    parts = {
        name
        for name, value in json.loads(index.read_text()).items()
        if isinstance(value, list) and not name.startswith("_") and value[-1] is not None
    }
    parts -= {"safety_checker", "watermarker"}  # never loaded here
    if "image_encoder" not in parts:
        parts -= {"feature_extractor"}  # the safety checker's
    return sorted(name for name in parts if not _whole(folder / name))


def _whole(part: Path) -> bool:
    """Whether a part has its configuration and, if it is a network, weights."""
    if not any(part.glob("*.json")):
        return False
    network = (part / "config.json").exists()
    return not network or any(
        path.stat().st_size for end in ("safetensors", "bin") for path in part.glob(f"*.{end}")
    )


def _class_name(folder: Path) -> str:
    index = folder / "model_index.json"
    if index.exists():
        name = json.loads(index.read_text()).get("_class_name")
    else:
        name = json.loads((folder / "config.json").read_text()).get("architectures")
    if isinstance(name, list):  # module and class of a pipeline with its own code; architectures
        name = name[-1] if name else None
    return str(name or "model that does not name its class")


def loaded(found: Finding) -> Finding:
    """What came of loading a shipped model by its own class."""
    folder, began = WEIGHTS / found.name, time.perf_counter()
    name = _class_name(folder)
    kind = kind_of(name)
    if kind is None:
        return Finding("broken", found.name, f"holds a {name}, which nothing here loads")
    loader = kind.loader_name
    try:
        named(kind.loader).from_pretrained(folder)
    except Exception as error:
        return Finding("broken", found.name, f"{loader} does not load it: {_first_line(error)}")
    seconds = time.perf_counter() - began
    return Finding("ok", found.name, f"{found.detail}; loaded by {loader} in {seconds:.1f} s")


def hub_models(offline: bool) -> list[Finding]:
    """Each known published model: in the cache, to be had, or why not."""
    known = [(kind, model) for kind in MODELS.values() for model in kind.published]
    with ThreadPoolExecutor(len(known)) as pool:
        return list(pool.map(lambda each: hub_model(each[0], each[1], offline), known))


def hub_model(kind: ModelKind, model: Published, offline: bool) -> Finding:
    """Whether one published model can be used, and what to do if not."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model.source, "model_index.json")
    missing = missing_parts(Path(index).parent) if isinstance(index, str) else []
    if not isinstance(index, str):
        state = _why_not_cached(model.source, offline)
    elif missing:
        state = f"the cache lacks {', '.join(missing)}: hf download {model.source}"
    else:
        state = "in the cache"
    found: State = "ok" if state == "in the cache" else "absent"
    return Finding(found, model.source, f"{kind.loader_name} ({model.purpose}): {state}")


def _why_not_cached(source: str, offline: bool) -> str:
    """Whether a model could be downloaded, asked with a HEAD request for its index."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if offline:
        return "not in the cache; the hub was not asked (--offline)"
    try:
        get_hf_file_metadata(hf_hub_url(source, "model_index.json"), timeout=3)
    except OfflineModeIsEnabled:
        return "not in the cache, and HF_HUB_OFFLINE is set"
    except GatedRepoError:
        return f"gated: accept its licence at https://huggingface.co/{source}, then `hf auth login`"
    except (RepositoryNotFoundError, EntryNotFoundError):
        return "not on the hub (any more): give another id or a local folder"
    except Exception as error:  # no network, no route, a proxy that refuses, a hub in trouble
        return f"not in the cache, and the hub cannot be reached ({_first_line(error)})"
    return "not in the cache; downloaded at first use"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


if __name__ == "__main__":
    main()
