"""Curves for Weights & Biases, in its offline mode; without it a run that asks for them is refused in a line."""

from __future__ import annotations

import json
import struct
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from picardopt_3d.run import curves
from picardopt_3d.run.pipeline import run

from tests.integrations.helpers.tiny_runs import options


def records(path: Path) -> list[Any]:
    """What an offline file holds: a header of 7 bytes, then a log in LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-untyped,unused-ignore]

    content, at, found, whole = path.read_bytes(), 7, [], b""
    while at < len(content):
        if 32768 - at % 32768 < 7:  # no room for another head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def curve(folder: Path, name: str) -> dict[int, float]:
    """A curve of the only run in a folder, by step."""
    (path,) = folder.glob("offline-run-*/*.wandb")
    points = {}
    for record in records(path):
        row = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if name in row:
            points[int(row["step"])] = float(row[name])
    return points


@pytest.mark.slow  # it starts a service of its own
def test_every_step_and_the_pictures_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        report = run(options(tmp_path, window=3, wandb=True, picture_every=6))
    finally:
        library.teardown()  # its service, which would serve other runs of this process
    folder = tmp_path / "wandb"
    losses = curve(folder, "loss/loss")
    assert [losses[step] for step in range(12)] == pytest.approx(report["losses"])
    assert curve(folder, "picard/steps_per_sweep")[11] == pytest.approx(report["mean_stride"])
    pictures = list(folder.glob("offline-run-*/files/media/images/scene_*.png"))
    assert len(pictures) == 2
    (path,) = folder.glob("offline-run-*/*.wandb")
    (begun,) = [each.run for each in records(path) if each.HasField("run")]
    group = (folder / "group.txt").read_text()
    assert (begun.display_name, begun.run_group) == ("a red cube", group)
    assert (begun.project, begun.run_id) == ("picardopt", f"{group}-1")
    kept = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert kept["seed"] == 0
    assert kept["recipe"]["batch"] == 1


def test_without_it_a_run_that_asks_for_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(curves.metadata, "version", absent)
    with pytest.raises(ValueError, match=r'pip install "picardopt-3d\[wandb\]"'):
        run(options(tmp_path / "run", wandb=True))
    assert not (tmp_path / "run").exists()
    options(tmp_path / "run").check()
