"""The command `picardopt text-to-3d`: from a prompt to a folder with an object in it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import tyro

from .config import TextTo3DConfig, check_out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the arguments after `picardopt text-to-3d`; None: those of the process.

    Raises:
        SystemExit: 2 for arguments that cannot be used, 130 after Ctrl-C.
    """
    started = time.time()
    config = parse(argv)
    # Only now: what renders and scores takes seconds to import, which a mistyped option should not.
    from .pipeline import run

    try:
        report = run(config, started=started)
    except KeyboardInterrupt:
        print(f"\nstopped; what was finished is in {config.out}", file=sys.stderr)
        raise SystemExit(130) from None
    quality = (
        "no true views to compare with"
        if report["psnr"] is None
        else f"PSNR {report['psnr']:.1f} dB against the true views"
    )
    print(
        f"{report['prompt']!r}: {report['steps']} steps in {report['sweeps']} sweeps"
        f" ({report['mean_stride']:.2f} steps a sweep) by {report['workers']} worker(s);"
        f" {report['total_seconds']:.0f} s in all; {quality}\n"
        f"look at {config.out / 'contact_sheet.png'} and {config.out / 'turntable.mp4'}"
    )


def parse(argv: Sequence[str] | None = None) -> TextTo3DConfig:
    """Read the arguments; say what is wrong and leave with 2 if they cannot be used."""
    try:
        config = tyro.cli(
            TextTo3DConfig,
            args=list(sys.argv[1:] if argv is None else argv),
            prog="picardopt text-to-3d",
            description="Make a 3D object from a prompt, several optimizer steps at a time.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        check_out(config)
    except (ValueError, FileExistsError) as error:
        print(f"picardopt text-to-3d: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config
