"""A run that names neither workers nor window takes what its preset's measured curve says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.run import choice
from picardopt_3d.run.choice import CURVES, measured_of, with_choice
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.tolerances import parse_tolerance

from tests.integrations.helpers.tiny_runs import TINY

STRIDES = {str(window): 0.95 * window if window > 1 else 1.0 for window in range(1, 17)}


def entry(preset: str, joined: dict[str, list[float]], row_bytes: int = 4000) -> dict[str, Any]:
    """A curve: a gradient takes 0.1 s, and joined slots what is given."""
    measured = {"drifts": {"2": [0.1]}, "joined": joined, "strides": STRIDES}
    measured |= {"commit": 1e-3, "ahead": 1e-3, "sweep": 1e-3, "row_bytes": row_bytes}
    names = {"command": "text-to-3d", "method": "dreamfusion", "preset": preset, "device": "cpu"}
    return names | {"machine": "a machine", "measured": measured}


@pytest.fixture(autouse=True)
def curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two curves, and two cores."""
    file = tmp_path / "curves.json"
    tiny = entry("tiny", {"4": [0.1]}, 4 * 10**9)
    file.write_text(json.dumps({"curves": [entry("small", {"4": [0.3]}), tiny]}))
    monkeypatch.setattr(choice, "CURVES", file)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})


def config(out: Path, **changes: Any) -> TextTo3DConfig:
    default = TextTo3DConfig(
        prompt="a red cube", out=out, method="dreamfusion", preset="small", recipe=SMALL
    )
    return replace(default, device="cpu", **changes)


def test_what_the_curve_recommends_is_taken_and_said(tmp_path: Path) -> None:
    """Two workers, and four slots each in one call: eight steps take 0.3 s."""
    chosen, why = with_choice(config(tmp_path))
    assert (chosen.workers, chosen.window) == (2, 8)
    assert why is not None
    assert why.startswith("workers=2, window=8: 4")
    assert "the curve of preset small on a machine" in why
    assert with_choice(config(tmp_path)) == (chosen, why)


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 2},
        {"window": 4},
        {"sequential": True},
        {"tolerance": parse_tolerance(0.0)},
        {"predictor": "hold"},
        {"secants": 0},
        {"recipe": replace(SMALL, batch=5)},
        {"preset": "small-nerf"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_curve_is_not_of_stays_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = config(tmp_path, **changes)
    assert with_choice(given) == (given, None)


def test_one_device_has_nothing_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert with_choice(config(tmp_path)) == (config(tmp_path), None)


def test_a_run_keeps_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here one worker: four slots take as long as one, and an exchange takes longer."""
    presets: Any = METHODS["text-to-3d"]["dreamfusion"].presets
    monkeypatch.setitem(presets, "tiny", TINY)
    out = tmp_path / "cube"
    report = run(config(out, preset="tiny", recipe=TINY, picture_every=0))
    assert "note: workers=1, window=4: " in capsys.readouterr().err
    assert (report["workers"], report["window"]) == (1, 4)
    kept = load_config(RunFolder(out).config)
    assert (kept.workers, kept.window) == (1, 4)


def test_the_shipped_curves_are_of_presets() -> None:
    """Each of one, as it is, with all that a plan needs."""
    for each in json.loads(CURVES.read_text())["curves"]:
        presets = METHODS[each["command"]][each["method"]].presets
        assert each["preset"] in presets
        (stage,) = presets[each["preset"]].stages()
        measured = measured_of(each["measured"])
        assert measured.batch == stage.config.batch
        assert set(range(1, 17)) <= set(measured.strides)
        assert 0 < measured.commit < min(measured.drifts[measured.batch])


def test_a_bare_run_of_the_first_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two cores two workers and a step each: on a CPU slots gain nothing by sharing their calls."""
    monkeypatch.setattr(choice, "CURVES", CURVES)
    chosen, why = with_choice(config(tmp_path))
    assert (chosen.workers, chosen.window) == (2, 2)
    assert why is not None
    assert "Intel(R) Xeon(R)" in why
