"""What a run refuses in one line, what becomes of its folder then, and that workers agree on it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picardopt_3d.command import image_to_3d
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.run.agreement import agreed
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.worker import train_launched

from tests.helpers.pool import Pools
from tests.integrations.helpers.tiny_runs import TINY, TINY_OPTIONS, options


def test_the_exact_guidance_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exact guidance covers only"):
        run(options(tmp_path, prompt="a velvet armadillo"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe.steps", "0"], "steps=0"),
        (["--window", "-1"], "window=-1"),
        (["--workers", "0"], "workers=0"),
        (["--tolerance", "-1"], "tolerance=-1"),
        (["--tolerance", "nan"], "tolerance=nan"),
        (["--sequential", "--workers", "2"], "sequential with workers=2"),
        (["--predictor", "crystal-ball"], "crystal-ball"),
        (["--recipe.batch", "0"], "batch=0"),
        (["--recipe.rates.encoding", "0"], "rates.encoding=0"),
        (["--method", "alchemy"], "give one of dreamfusion"),
        (["--preset", "huge"], "give one of small"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path / "new"), *arguments])
    assert stop.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in words
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def earlier_run(out: Path) -> dict[str, bytes]:
    """A folder with all that a run may write, and one file that is not its own."""
    for own in (*RunFolder(out).own, out / "precious.txt"):
        path = own if own.suffix else own / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"earlier")
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_what_ends_before_the_first_step_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out, bad = tmp_path / "run", tmp_path / "bad.png"
    bad.write_text("no picture")
    before = earlier_run(out) if exists else {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = ["--out", str(out), "--overwrite", "--workers", "1", *TINY_OPTIONS]
    for command, arguments in (
        (image_to_3d, [str(bad), *few[:-2]]),
        (main, ["a corgi", *few]),
        (main, ["a red cube", *few, "--device", "cuda"]),
    ):
        with pytest.raises(SystemExit) as stop:
            command(arguments)
        assert stop.value.code == 2
        assert files(out) == before
        assert out.exists() == exists

    def fails(self: DreamFusion, step: int) -> dict[str, torch.Tensor]:
        assert files(out) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(DreamFusion, "loss", fails)
    with pytest.raises(KeyboardInterrupt):
        run(options(out, sequential=True, overwrite=True, tensorboard=True))
    assert files(out) == before
    assert out.exists() == exists


def test_overwrite_replaces_all_that_was_the_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_run(tmp_path)
    monkeypatch.setattr("picardopt_3d.run.pipeline.finish", lambda *_: {})
    run(options(tmp_path, overwrite=True, recipe=replace(TINY, steps=1)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "precious.txt", "stages"}
    assert {path.name for path in (tmp_path / "stages/1-stage").iterdir()} == {
        "checkpoint.pt",
        "record.json",
        "scene.safetensors",
    }


def one_complains(rank: int) -> str:
    try:
        with agreed():
            if torch.distributed.get_rank() == rank:
                raise FileNotFoundError("no model here")
    except FileNotFoundError as error:
        return str(error)
    return "fine"


class OfItsOwn(OSError):
    """An error that cannot be made again from what it says."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)
        self.response = response


def one_fails(kind: str, rank: int) -> str:
    errors = {
        "programming": RuntimeError("a bug"),
        "bare": AssertionError(),
        "unsendable": OfItsOwn("no model here", response=404),
    }
    try:
        with agreed():
            if torch.distributed.get_rank() == rank:
                raise errors[kind]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_an_error_that_is_no_user_error_leaves_no_worker_waiting(pools: Pools) -> None:
    found = pools(2).run(one_fails, "programming", 1)
    assert found == ["RuntimeError: worker 1 failed: RuntimeError('a bug')", "RuntimeError: a bug"]
    assert pools(2).run(one_fails, "bare", 0) == [
        "AssertionError: ",
        "RuntimeError: worker 0 failed: AssertionError()",
    ]
    assert pools(2).run(one_fails, "unsendable", 0) == [
        "OfItsOwn: no model here",
        "OSError: no model here",
    ]


def test_workers_complain_together(tmp_path: Path, pools: Pools) -> None:
    found = pools(2).run(
        train_launched, options(tmp_path, workers=2, prompt="a corgi"), time.time(), False
    )
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert pools(2).run(one_complains, 1) == ["no model here"] * 2
    assert pools(2).run(one_complains, 2) == ["fine"] * 2


@pytest.mark.slow
def test_two_workers_say_in_one_line_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["a corgi", "--out", str(tmp_path / "run"), "--workers", "2", *TINY_OPTIONS])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("picardopt text-to-3d: prompt='a corgi'")
    assert not (tmp_path / "run").exists()
