"""Which models can be used: those that ship, and published ones in the hub's cache or on the hub."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from picardopt_3d.doctor.finding import Finding, State, first_line
from picardopt_3d.models import MODELS, WEIGHTS, ModelKind, Published, kind_of, named


def shipped_models() -> list[Finding]:
    """Returns whether each shipped model is whole."""
    folders = {WEIGHTS / "text-to-view", *(x for x in WEIGHTS.glob("*") if x.is_dir())}
    return [_shipped_model(folder) for folder in sorted(folders)]


def _shipped_model(folder: Path) -> Finding:
    """Whether one shipped model is whole."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing = missing_parts(folder)
    if missing:
        remedy = f"lacks {', '.join(missing)} in {folder}: install picardopt-3d again"
        return Finding("broken", folder.name, remedy)
    return Finding("ok", folder.name, f"{size / 1e6:.1f} MB; {_class_name(folder)}")


def missing_parts(folder: Path) -> list[str]:
    """Returns the parts of a model folder that its index names and that are not there.

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
    """The class that a model's own index names."""
    index = folder / "model_index.json"
    if index.exists():
        name = json.loads(index.read_text()).get("_class_name")
    else:
        name = json.loads((folder / "config.json").read_text()).get("architectures")
    if isinstance(name, list):  # module and class of a pipeline with its own code; architectures
        name = name[-1] if name else None
    return str(name or "model that does not name its class")


def loaded(found: Finding) -> Finding:
    """Loads a shipped model by its own class, and returns what came of it."""
    folder, began = WEIGHTS / found.name, time.perf_counter()
    name = _class_name(folder)
    kind = kind_of(name)
    if kind is None:
        return Finding("broken", found.name, f"holds a {name}, which nothing here loads")
    loader = kind.loader_name
    try:
        named(kind.loader).from_pretrained(folder)
    except Exception as error:
        return Finding("broken", found.name, f"{loader} does not load it: {first_line(error)}")
    seconds = time.perf_counter() - began
    return Finding("ok", found.name, f"{found.detail}; loaded by {loader} in {seconds:.1f} s")


def hub_models(offline: bool) -> list[Finding]:
    """Returns for each known published model whether it is in the cache, can be downloaded, or why not."""
    known = [(kind, model) for kind in MODELS.values() for model in kind.published]
    with ThreadPoolExecutor(len(known)) as pool:
        return list(pool.map(lambda each: hub_model(each[0], each[1], offline), known))


def hub_model(kind: ModelKind, model: Published, offline: bool) -> Finding:
    """Returns whether one published model can be used, and what to do if not."""
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
        return f"not in the cache, and the hub cannot be reached ({first_line(error)})"
    return "not in the cache; downloaded at first use"
