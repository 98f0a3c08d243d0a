"""The command `picardopt evaluate`, end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from picardopt_3d.evaluate.command import main
from picardopt_3d.world import Subject

from tests.integrations.test_evaluate import save_run

QUICK = ["--views", "4", "--size", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    save_run(place / "cube", Subject("cube", "red"))
    save_run(place / "ball", Subject("sphere", "blue"), seed=4)
    save_run(place / "image", Subject("torus", "green"), method="zero123", prompt=None)
    return place


def test_it_prints_a_table_and_writes_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "domain.npz"
    main(["--make-reference", "domain", "--out", str(made), *QUICK])
    told = capsys.readouterr().out
    assert told == (
        f"{made}: 256 pictures (64 subjects of the built-in world, 4 views each, 24 pixels), 64 features of clip\n"
    )
    runs = [str(place / name) for name in ("cube", "ball", "image")]
    table = tmp_path / "table.csv"
    main([*runs, "--csv", str(table), "--fid-reference", str(made), "--prompts", "domain", *QUICK])
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == runs
    assert lines[6].startswith("mean of 2: method=dreamfusion preset=small")
    assert "4 views of each run at 12 degrees, judged by clip among 64 prompts" in told.out
    assert "compare equal numbers of pictures only" in told.out  # 4 views, 64 features
    assert "judging" in told.err  # the progress bar
    with table.open(newline="") as file:
        cube, _, image, mean = csv.DictReader(file)
    assert (cube["prompt"], image["prompt"], image["r_precision"]) == ("a red cube", "", "")
    assert float(cube["r_precision"]) >= 0.5
    assert float(image["psnr"]) > 12  # its true subject is known all the same
    assert (cube["seconds"], cube["seconds_with_startup"]) == ("12.5", "14.75")
    assert (mean["runs"], mean["seed"]) == ("2", "")


def test_one_prompt_is_nothing_to_choose_from(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(place / "cube"), *QUICK])
    told = capsys.readouterr().out
    assert "no R-precision: there is only one prompt" in told
    assert "mean nothing" not in told
    assert "mean of" not in told


def test_the_shipped_judge_is_not_trusted_with_other_prompts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("a corgi\n")
    main([str(place / "cube"), "--prompts", str(tmp_path / "more.txt"), *QUICK])
    assert "the shipped judge knows only the built-in world" in capsys.readouterr().out


def test_group_by_what_the_report_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(place / name) for name in ("cube", "ball")]
    main([*runs, *QUICK, "--group-by", "seed"])
    assert "mean of" not in capsys.readouterr().out
    main([*runs, *QUICK, "--group-by", "method", "size"])
    assert "mean of 2: method=dreamfusion size=32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no runs: give the folders of finished runs"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "is no finished run: it has no scene.safetensors"),
        (["CUBE", "--views", "1"], "views=1: give at least 2"),
        (["CUBE", "--fov", "180"], "fov=180.0: give a number between 0 and 180"),
        (["CUBE", "--out", "a.npz"], "is for a reference only: write the table with --csv"),
        (["CUBE", "--prompts", "nowhere"], "prompts='nowhere': there is no such file"),
        (["CUBE", "--clip", "nowhere"], "clip='nowhere': there is no such folder"),
        (["CUBE", "--fid-reference", "nowhere"], "fid-reference='nowhere': there is no such"),
        (["CUBE", "--fid-reference", "other.npz"], "holds statistics of 'another', but pictures"),
        (["--make-reference", "domain"], "without out: give the file to write with --out FILE.npz"),
        (["--make-reference", "domain", "--out", "a.txt"], "give a file that ends in .npz"),
        (["--make-reference", "nowhere", "--out", "a.npz"], "there is no such folder"),
        (["--make-reference", ".", "--out", "a.npz"], "hold no pictures"),
        (["CUBE", "--make-reference", "domain", "--out", "a.npz"], "write the reference first"),
    ],
)
def test_it_says_what_is_wrong(
    place: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = {"count": 9, "model": "another", "fingerprint": "its", "source": "somewhere"}
    np.savez("other.npz", mean=np.zeros(64), covariance=np.eye(64), **entries)
    with pytest.raises(SystemExit) as caught:
        main([str(place / "cube") if word == "CUBE" else word for word in arguments])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "picardopt evaluate" in told
    assert said in " ".join(told.split())
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]


def test_a_damaged_scene_names_its_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "damaged", Subject("cube", "red"))
    (run / "scene.safetensors").write_bytes(b"half a scene")
    with pytest.raises(SystemExit):
        main([str(run), *QUICK])
    assert str(run / "scene.safetensors") in capsys.readouterr().err


@pytest.mark.parametrize("module", ["evaluate", "export"])
def test_help_needs_nothing_heavy(module: str) -> None:
    code = (
        f"import sys\nfrom picardopt_3d.{module}.command import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        "import json\nprint(json.dumps([m for m in ('torch', 'transformers', 'skimage') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert f"picardopt {module}" in done.stdout
