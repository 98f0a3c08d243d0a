"""Which rasterizer is used where, told with packages named gsplat that do not work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from picardopt_3d.scenes.gaussians import gsplat_backend
from picardopt_3d.scenes.gaussians.gsplat_backend import why_not
from picardopt_3d.scenes.gaussians.rasterize import chosen

CUDA = torch.device("cuda")


@pytest.fixture
def gsplat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the extension of a gsplat that leads the import path; it is empty."""
    package = tmp_path / "gsplat" / "cuda"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_gsplat(name)}
    gsplat_backend._trouble.cache_clear()
    yield package / "_backend.py"
    for name in [name for name in sys.modules if _of_gsplat(name)]:
        del sys.modules[name]
    sys.modules.update(before)
    gsplat_backend._trouble.cache_clear()


def _of_gsplat(name: str) -> bool:
    return name.split(".")[0] == "gsplat"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise RuntimeError('nvcc:\\nno such file')", "does not build: no such file"),
        ("raise RuntimeError", "does not build: RuntimeError"),
        ("import no_such_package", "does not import: No module named 'no_such_package'"),
        ("_C = None", "found no CUDA toolkit"),
    ],
)
def test_auto_does_not_pass_over_a_gsplat_that_fails(gsplat: Path, content: str, said: str) -> None:
    """Else one process could draw with torch and another with gsplat: a drift that depends on the rank."""
    gsplat.write_text(content)
    reason = why_not(CUDA)
    assert reason is not None
    assert said in reason
    with pytest.raises(ValueError, match='rasterizer="torch"') as refused:
        chosen("auto", CUDA)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match='rasterizer="torch"'):
        chosen("gsplat", CUDA)
    assert chosen("torch", CUDA) == "torch"
    assert chosen("auto", torch.device("cpu")) == "torch"


def test_a_gsplat_that_works_is_used_and_one_that_is_missing_is_not(
    gsplat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gsplat.write_text("_C = object()")
    assert why_not(CUDA) is None
    assert chosen("auto", CUDA) == chosen("gsplat", CUDA) == "gsplat"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen("auto", CUDA) == "torch"
    with pytest.raises(ValueError, match="pip install gsplat"):
        chosen("gsplat", CUDA)


def test_an_import_that_fails_is_not_tried_again_at_every_render(
    gsplat: Path,
) -> None:
    gsplat.write_text("raise RuntimeError('no')")
    reason = why_not(CUDA)
    gsplat.write_text("_C = object()")
    assert reason == why_not(CUDA) == "gsplat's CUDA extension does not build: no"
