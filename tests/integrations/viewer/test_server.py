"""The server of a viewer: its address, what it refuses, and what it leaves alone."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import viser
from picardopt_3d.command import text_to_3d
from picardopt_3d.run.worker import train
from picardopt_3d.viewer.command import main
from picardopt_3d.viewer.server import LOOPBACK, address, serving

from tests.integrations.helpers.tiny_runs import options
from tests.integrations.helpers.viewers import Client, beside, free_port


def test_only_this_machine_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with serving(LOOPBACK, port):
        with socket.create_connection((LOOPBACK, port), 5.0):
            pass
        # Every address of 127.0.0.0/8 is this machine's; only the first one is listened at.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5.0)
    found = capsys.readouterr()
    assert found.err == f"viewer: http://{LOOPBACK}:{port}\n"
    assert found.out == ""
    with pytest.raises(ConnectionRefusedError):  # it has ended
        socket.create_connection((LOOPBACK, port), 5.0)


def test_an_address_for_a_browser() -> None:
    assert address("0.0.0.0", 1) == f"http://{socket.gethostname()}:1"
    assert address("::1", 2) == "http://[::1]:2"


def test_pings_draw_nothing_from_the_global_generator() -> None:
    with serving(LOOPBACK, 0) as server:
        client = Client(server.get_port())
        client.wait_for(server.get_clients)
        (connection,) = server._websock_server._live_connections.values()
        before = random.getstate()
        loop = server.get_event_loop()

        async def ping() -> None:
            await (await connection.ping())

        asyncio.run_coroutine_threadsafe(ping(), loop).result(10.0)
        assert random.getstate() == before
        client.close()


def test_nothing_is_published_on_the_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(viser.ViserServer, "request_share_url", lambda self: asked.append(True))
    with serving(LOOPBACK, 0) as server:
        client = Client(server.get_port())
        client.wait_for(server.get_clients)
        client.ask_for_a_public_address()
        client.look_from(50.0)  # handled after it
        (own,) = server.get_clients().values()
        client.wait_for(lambda: own.camera.position[0] < 1.5)
        client.close()
    assert not asked


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["--viewer-port", "{taken}"],
            r"--viewer-port \d+: 127.0.0.1:\d+ is in use .* another port",
        ),
        (["--viewer-host", "203.0.113.7"], "--viewer-host 203.0.113.7: .* address of this machine"),
        (["--viewer-host", "no.such.host.invalid"], "--viewer-host no.such.host.invalid: "),
        (["--viewer-port", "70000"], "viewer_port=70000: give a number from 0"),
    ],
)
def test_addresses_that_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        given = [each.format(taken=taken.getsockname()[1]) for each in given]
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as ended:
            text_to_3d(["a red cube", "--out", str(out), "--workers", "1", "--viewer", *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(f"^picardopt text-to-3d: .*{says}", error, re.MULTILINE)
    assert not out.exists()


def test_without_viser_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    for command, given in (
        (text_to_3d, ["a red cube", "--out", str(tmp_path / "run"), "--viewer"]),
        (main, [str(tmp_path)]),
    ):
        with pytest.raises(SystemExit) as ended:
            command(given)
        assert ended.value.code == 2
        assert "pip install 'picardopt-3d[viewer]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_is_served_until_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options(tmp_path, window=4, picture_every=6), time.time())
    port = free_port()

    def act(client: Client) -> None:
        client.wait_for(client.pictures)
        os.kill(os.getpid(), signal.SIGINT)

    with beside(port, act) as clients:
        main([str(tmp_path), "--viewer-port", str(port)])
    texts = clients[0].texts()
    assert any("finished, 1-stage" in text and "12 of 12" in text for text in texts)
    assert clients[0].of("GuiUplotMessage")
    assert [each["props"]["label"] for each in clients[0].of("GuiImageMessage")] == ["step_00012"]
    assert not clients[0].of("GuiButtonMessage")  # nothing to pause
    assert capsys.readouterr().err.endswith("stopped\n")


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--viewer-port", "0"])
    assert ended.value.code == 2
    assert "is no run's folder: it has no config.yaml" in capsys.readouterr().err
