"""The command `picardopt view`, which shows a run's folder in the browser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from picardopt_3d.cli_errors import cli_errors, options_of
from picardopt_3d.viewer.server import LOOPBACK, PORT, check_viewer


@dataclass(frozen=True)
class ViewConfig:
    """The options of `picardopt view`.

    Attributes:
        run: Folder of a run, which may still be running.
        viewer_host: Address at which the page is served; by default this machine alone can reach it.
        viewer_port: Port at which it is served; 0: any that is free.
        device: Device that renders: "auto" (an accelerator if there is one), "cpu" or "cuda".
    """

    run: Positional[Path]
    viewer_host: str = LOOPBACK
    viewer_port: int = PORT
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command, until Ctrl-C.

    Args:
        argv: The arguments after `picardopt view`; None: those of this process.

    Raises:
        SystemExit: 2 if the arguments or the run cannot be used.
    """
    described = (
        "Show a run in the browser, finished or while it goes on: its scene, strides and settings."
    )
    with cli_errors("view"):
        config = options_of(ViewConfig, "view", argv, described)
        check_viewer(config.viewer_host, config.viewer_port)
        # Imported here because torch takes seconds to import, which a mistyped option should not wait for.
        from picardopt_3d.viewer.folder import view

        try:
            view(config.run, config.viewer_host, config.viewer_port, config.device)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
