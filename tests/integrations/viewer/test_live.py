"""A run with a viewer: its bits stay, its clients see it, and it does what they ask for."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d import picard
from picardopt_3d.config import RunConfig, TextTo3DConfig
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.viewer.follow import FollowedRun, Found
from picardopt_3d.viewer.pauses import Pauses
from picardopt_3d.viewer.server import LOOPBACK
from safetensors.torch import load_file
from torch.distributed import HashStore

from picardopt import ParallelPicardOptimizer, load_checkpoint
from picardopt.rng import RngState, seed_all
from tests.helpers.pool import Pools
from tests.integrations.helpers.recipes import tiny
from tests.integrations.helpers.tiny_runs import TINY, options
from tests.integrations.helpers.viewers import Client, beside, free_port

STEPS = 24


def run_of(out: Path, kind: str = "voxels", **changes: Any) -> TextTo3DConfig:
    """A run of voxels, of a network with an occupancy grid ("dreamfusion"), or of Gaussians that split."""
    recipe: Any = TINY if kind == "voxels" else tiny("text-to-3d", kind, {"zero123": Path()})
    return options(out, **{"recipe": replace(recipe, steps=STEPS), "window": 4} | changes)


def watched(config: TextTo3DConfig) -> TextTo3DConfig:
    """The same run with a viewer, in another folder."""
    out = config.out.with_name("watched")
    return replace(config, out=out, viewer=True, viewer_port=free_port())


def record_of(config: RunConfig[Any]) -> RunRecord:
    return RunRecord.load(RunFolder(config.out).begun()[-1])


def assert_same_run(first: RunConfig[Any], second: RunConfig[Any]) -> None:
    """Every bit of scene, carry and optimizer, every loss, stride and residual."""
    one, other = record_of(first), record_of(second)
    assert one.losses == other.losses
    assert one.strides == other.strides
    assert one.residuals == other.residuals
    scenes = [load_file(RunFolder(each.out).scene) for each in (first, second)]
    assert scenes[0].keys() == scenes[1].keys()
    assert all(torch.equal(scenes[0][name], scenes[1][name]) for name in scenes[0])
    assert torch.equal(*(moments(each) for each in (first, second)))


def assert_panel(client: Client) -> None:
    """Figures, curves, settings."""
    texts = client.texts()
    assert any("a red cube" in text for text in texts)
    assert any(f"of {STEPS}" in text and "steps a sweep" in text for text in texts)
    assert any("viewer_port" in text and "preset: small" in text for text in texts)
    titles = [plot["props"]["title"].partition(" by ")[0] for plot in client.of("GuiUplotMessage")]
    assert titles[:1] == [
        "loss"
    ]  # the others come with the second sweep, unless the run ends first


def moments(config: RunConfig[Any]) -> torch.Tensor:
    """The state of the optimizer in the last checkpoint, as one row."""
    state = load_checkpoint(RunFolder(config.out).begun()[-1].checkpoint)["optimizer"]["state"]
    return torch.cat([value.flatten() for own in state.values() for value in own.values()])


def paused_after(client: Client) -> int:
    """The step after which the run pauses; 0: none yet."""
    found = [re.search(r"paused after step (\d+)", text) for text in client.texts()]
    return max((int(each[1]) for each in found if each), default=0)


def seen(client: Client) -> int:
    """How often a client was sent the scene."""
    return len(client.pictures()) + len(client.of("GaussianSplatsMessage"))


def pausing(act: Callable[[Client], None]) -> Callable[[Client], None]:
    """Pauses a run, acts, and goes on with a camera that moves until the end."""

    def run(client: Client) -> None:
        client.click("Pause")
        client.wait_for(lambda: paused_after(client))
        act(client)
        client.click("Pause")
        turn = 0.0
        while client.look_from(turn):
            turn += 7.0
            time.sleep(0.005)

    return run


def look_around(client: Client) -> None:
    """Waits until the scene is there, and until it is seen from three other sides where the server renders it."""
    client.wait_for(lambda: seen(client))
    for turn in (10.0, 20.0, 30.0) if client.pictures() else ():
        before = seen(client)
        client.look_from(turn)
        client.wait_for(lambda before=before: seen(client) > before)


@pytest.mark.parametrize(
    "kind",
    [
        "voxels",
        pytest.param("dreamfusion", marks=pytest.mark.slow),
        pytest.param("dreamgaussian", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_watched_has_the_same_bits(tmp_path: Path, kind: str) -> None:
    plain = run_of(tmp_path / "plain", kind)
    seed_all(3)
    train(plain, time.time())
    config, generators = watched(plain), RngState.capture()
    seed_all(3)
    with beside(config.viewer_port, pausing(look_around)) as clients:
        train(config, time.time())
    assert RngState.capture().same(generators)
    assert_same_run(plain, config)
    record = record_of(plain)
    assert max(record.strides) > 1  # steps were queued while the scene was rendered
    if kind == "dreamgaussian":
        assert len(record.counts["Gaussians"]) > 1
        assert clients[0].of("GaussianSplatsMessage")
        assert not clients[0].pictures()
    else:
        assert len(clients[0].pictures()) >= 4
    assert_panel(clients[0])


def impatient(config: RunConfig[Any], timeout: float) -> None:
    """A run whose ranks wait for each other no longer than this, seconds."""
    with pytest.MonkeyPatch.context() as patch:

        def hasty(*args: Any, **kwargs: Any) -> ParallelPicardOptimizer:
            return ParallelPicardOptimizer(*args, **kwargs, timeout=timeout)

        patch.setattr(picard, "ParallelPicardOptimizer", hasty)
        train(config, time.time())


@pytest.mark.slow
def test_two_workers_pause_for_longer_than_they_wait_for_each_other(
    tmp_path: Path, pools: Pools
) -> None:
    plain = run_of(tmp_path / "plain", workers=2)
    pools(2).run(train, plain, time.time())

    def stay(client: Client) -> None:
        look_around(client)
        time.sleep(9.0)

    for name in ("watched", "again"):  # the pool's store still holds the first one's pauses
        config = replace(watched(plain), out=tmp_path / name)
        with beside(config.viewer_port, pausing(stay)) as clients:
            pools(2).run(impatient, config, 4.0)
        assert_same_run(plain, config)
        assert 1 < paused_after(clients[0]) < STEPS


def test_workers_that_are_ahead_stop_at_the_same_step() -> None:
    store = HashStore()
    first, other = Pauses(store, 0, 4), Pauses(store, 0, 4)
    other.join(5)  # nothing is asked for
    assert not first.begins(3)
    assert [first.begins(taken) for taken in (4, 5, 6, 7)] == [False, False, False, True]
    other.join(6)
    waiting = threading.Thread(target=other.join, args=(7,), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.end()
    waiting.join(10.0)
    assert not waiting.is_alive()
    # Another one, taken back before it began: nobody waits.
    assert not first.begins(8)
    first.end()
    other.join(12)
    assert Pauses(None, 0, 4).begins(1)  # a worker alone pauses at once


def test_a_paused_run_saves_and_its_folder_can_be_looked_at(tmp_path: Path) -> None:
    config = watched(run_of(tmp_path / "plain"))
    found: list[Found] = []

    def save(client: Client) -> None:
        followed = FollowedRun(config.out)
        assert followed.look() == Found(None, None, None, "")
        client.click("Save a checkpoint")
        client.wait_for(lambda: client.of("NotificationShowMessage"))
        found.append(followed.look())
        assert followed.look().scene is None  # nothing new
        time.sleep(1.0)

    begun = time.time()
    with beside(config.viewer_port, pausing(save)) as clients:
        record = train(config, time.time())
    assert time.time() - begun > record.seconds + record.startup_seconds + 1.0  # without the pause
    at = paused_after(clients[0])
    assert 0 < at < STEPS
    first, last = found[0], FollowedRun(config.out).look()
    assert first.stage == last.stage == "1-stage"
    assert first.record is not None
    assert first.record.step == at
    assert first.record.losses == record.losses[:at]
    assert last.record is not None
    assert last.record.step == STEPS
    assert first.scene is not None
    assert last.scene is not None
    own = load_file(RunFolder(config.out).scene)
    assert all(torch.equal(value, own[name]) for name, value in last.scene.state_dict().items())
    moved = [not torch.equal(value, own[name]) for name, value in first.scene.state_dict().items()]
    assert any(moved)


def test_ctrl_c_ends_a_paused_run_and_its_viewer(tmp_path: Path) -> None:
    config = watched(run_of(tmp_path / "plain"))

    def stop(client: Client) -> None:
        client.click("Pause")
        client.wait_for(lambda: paused_after(client))
        os.kill(os.getpid(), signal.SIGINT)

    with (
        pytest.raises(KeyboardInterrupt),
        beside(config.viewer_port, stop) as clients,
    ):
        train(config, time.time())
    assert record_of(config).step == paused_after(clients[0]) < STEPS
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, config.viewer_port), 5.0)
