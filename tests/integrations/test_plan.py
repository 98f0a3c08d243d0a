"""`picardopt plan`: from a recipe's first steps to a recommendation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from picardopt_3d.command import parse
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.plan import _of_batch, _parts, main
from picardopt_3d.run.folder import RunFolder

TINY = [
    *("--recipe.guidance.model", "exact", "--recipe.batch", "4", "--recipe.pixels", "8"),
    *("--recipe.steps", "40", "--device", "cpu"),
]


def planned(out: Path, *options: str) -> list[str]:
    return ["text-to-3d", "a red cube", "--out", str(out), *TINY, *options]


def test_a_recipe_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the sentence are printed, all of it is in plan.json, and a run may follow in the folder."""
    out = tmp_path / "cube"
    main(planned(out, "--devices", "4", "--link", "pcie", "--probe", "30", "--window", "4"))
    said = capsys.readouterr().out
    assert "'a red cube', dreamfusion, the first 30 steps" in said
    assert "one device" in said
    assert "data parallel" in said
    found = json.loads(RunFolder(out).plan.read_text())
    assert found["sentence"] in said
    assert found["link"]["name"] == "PCIe"
    assert set(found["measured"]["drifts"]) == {"4", "2", "1"}
    assert found["devices"] == 4
    assert 1 < found["measured"]["strides"]["4"] <= 4
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    assert parse("text-to-3d", planned(out)[1:], "").out == out
    (out / "other").touch()
    with pytest.raises(SystemExit):
        parse("text-to-3d", planned(out)[1:], "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0"], "devices=0"),
        (["--probe", "2"], "usable sweeps"),
        (["--window", "1"], "usable sweeps"),
        (["--link", "string"], "invalid choice"),
    ],
)
def test_what_cannot_be_planned_ends_with_an_error(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(planned(tmp_path / "cube", *options))
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cube").exists()


def test_what_can_be_planned_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "--devices N" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["text-to-2d", "a red cube"])
    assert left.value.code == 2
    assert "text-to-3d, image-to-3d" in capsys.readouterr().err


def test_a_part_of_a_batch_is_evaluated_as_such() -> None:
    """And the problem has its own batch again, whatever happens."""
    problem = SimpleNamespace(config=SMALL)

    def closure(step: int) -> object:
        if step == 1:
            raise KeyError
        return problem.config.batch

    part = _of_batch(problem, closure, 3)
    assert part(0) == 3
    with pytest.raises(KeyError):
        part(1)
    assert problem.config is SMALL


@pytest.mark.parametrize(
    ("batch", "parts"), [(16, [16, 8, 4, 2, 1]), (12, [12, 6, 3, 1]), (3, [3, 1]), (1, [1])]
)
def test_the_parts_of_a_batch(batch: int, parts: list[int]) -> None:
    assert _parts(batch) == parts
