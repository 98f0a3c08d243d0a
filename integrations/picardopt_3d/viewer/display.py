"""A scene in the browser: Gaussians and triangles as they are, fields as pictures from each client's camera."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from picardopt.rng import preserved_rng
from picardopt_3d.export.pictures import to_pixels
from picardopt_3d.scenes import Gaussians, Scene
from picardopt_3d.viewer.cameras import camera_of
from picardopt_3d.viewer.pace import Shown, Speed
from picardopt_3d.viewer.parts import UPRIGHT, glb_of, splats_of

if TYPE_CHECKING:
    from viser import ClientHandle, GaussianSplatHandle, ViserServer

_NODE = "/object"
_SLOWEST = 0.5
"""Seconds between two versions of Gaussians or triangles, at least; and nine times what sending one takes."""


class Display:
    """Shows the present scene to every client; what nobody looks at costs nothing.

    All work is done in `serve`, by the thread that calls it: the scene must not change meanwhile.

    Args:
        server: The server.
    """

    def __init__(self, server: ViserServer) -> None:
        self.server = server
        self.scene: Scene | None = None
        self.step: int | None = None
        self._state = 0
        self._sent = Shown()
        self._splats: GaussianSplatHandle | None = None
        self._shown: dict[int, Shown] = {}
        self._speed = Speed()
        self._said: set[str] = set()

    def look_from(self, distance: float, fov: float) -> None:
        """Sets where new clients look from.

        Args:
            distance: Of the camera, scene units.
            fov: Its vertical field of view, degrees.
        """
        direction = np.array([0.84, 0.36, 0.41])
        self.server.initial_camera.position = distance * direction / np.linalg.norm(direction)
        self.server.initial_camera.look_at = np.zeros(3)
        self.server.initial_camera.fov = float(np.deg2rad(fov))

    def show(self, scene: Scene, step: int | None = None) -> None:
        """Shows another scene, or that a scene has changed.

        Args:
            scene: The scene.
            step: Step of the run, for what comes in progressively; None: a finished scene.
        """
        if scene is not self.scene:
            self.clear()
            self.scene = scene
        self.step = step
        self._state += 1

    def clear(self) -> None:
        """Shows nothing."""
        if self.scene is not None:
            self.server.scene.remove_by_name(_NODE)
            for client in self.server.get_clients().values():
                client.scene.set_background_image(None)
        self.scene, self._splats = None, None
        self._sent, self._shown, self._speed = Shown(), {}, Speed()

    def serve(self) -> None:
        """Sends to the clients what is due; what a scene cannot show is said once, and ends nothing."""
        clients = self.server.get_clients()
        if self.scene is None or not clients:
            self._shown.clear()
            return
        try:
            self._serve(self.scene, clients)
        except (ValueError, RuntimeError) as error:  # no surface, no memory, ...
            self._sent.scene, self._sent.at = self._state, time.time()
            if str(error) not in self._said:
                self._said.add(str(error))
                print(f"\nviewer: {error}", file=sys.stderr)

    def _serve(self, scene: Scene, clients: dict[int, ClientHandle]) -> None:
        if isinstance(scene, Gaussians) or type(scene).shell is not Scene.shell:
            self._send_parts(scene)
            return
        self._shown = {each: self._shown.get(each, Shown()) for each in clients}
        for number, client in clients.items():
            self._send_picture(scene, client, self._shown[number])

    def _send_parts(self, scene: Scene) -> None:
        """Sends Gaussians or triangles, which the clients draw themselves."""
        begun = time.time()
        wait = max(_SLOWEST, 9 * self._sent.seconds)
        if self._sent.scene == self._state or begun - self._sent.at < wait:
            return
        if isinstance(scene, Gaussians):
            splats = splats_of(scene.splats())
            if self._splats is None:
                self._splats = self.server.scene.add_gaussian_splats(_NODE, *splats)
            else:
                self._splats.set_gaussians(*splats)
        else:
            with _leaving_no_trace():
                content = glb_of(scene)
            self.server.scene.add_glb(_NODE, content, wxyz=UPRIGHT)
        ended = time.time()
        self._sent = Shown(scene=self._state, at=ended, seconds=ended - begun)

    def _send_picture(self, scene: Scene, client: ClientHandle, shown: Shown) -> None:
        """Renders what a client's camera sees, if that is due."""
        camera, begun = client.camera, time.time()
        moved = camera.update_timestamp
        kind = shown.due(begun, moved, self._state)
        if kind is None:
            return
        view = camera_of(camera.wxyz, camera.position, camera.fov).to(scene.device)
        height, width = self._speed.size(kind, camera.image_height, camera.image_width)
        with _leaving_no_trace():
            pixels = to_pixels(scene.render(view, (height, width), step=self.step).rgb)[0]
        ended = time.time()
        self._speed.learn(height * width, ended - begun)
        client.scene.set_background_image(pixels, "jpeg", jpeg_quality=90)
        shown.camera, shown.scene, shown.kind = moved, self._state, kind
        shown.at, shown.seconds = ended, ended - begun


@contextlib.contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """Keeps the run's random numbers, and builds no graph."""
    with torch.no_grad(), preserved_rng():
        yield
