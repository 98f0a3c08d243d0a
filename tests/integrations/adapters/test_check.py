"""check.py: a script, one step after the other and running ahead."""

from pathlib import Path

import pytest
import torch

from integrations.adapters.check import WAYS, Run, main, run_script

SCRIPT = """
import random
import torch
from picardopt import ParallelPicardOptimizer

parameter = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.Adam([parameter], lr=0.01)
optimizer = ParallelPicardOptimizer(optimizer, window=4, audit="never")
own = random.Random(0)

def closure(step):
    optimizer.zero_grad()
    target = torch.randn(3) if {pure} else torch.tensor(own.random())
    loss = (parameter - target).abs().sum()
    loss.backward()
    return loss

for _ in range(12):
    optimizer.step(closure)
"""


def runs(folder: Path, *, pure: bool) -> dict[str, Run]:
    script, found = folder / "train.py", {}
    script.write_text(SCRIPT.format(pure=pure))
    for way in WAYS:
        run_script(script, way, None, folder / "run.pt")
        found[way] = Run(**torch.load(folder / "run.pt"))
    return found


def test_a_pure_script_gives_the_same_bits(tmp_path: Path) -> None:
    found = runs(tmp_path, pure=True)
    order, exact, free, other = (found[way] for way in WAYS)
    assert exact.same(order)
    assert len(order.losses) == len(exact.losses) == len(free.losses) == 12
    assert order.sweeps == 0
    assert 0 < free.sweeps < 12
    assert 0 <= free.distance(order) < 1
    assert other.distance(order) > 0


def test_one_that_keeps_a_generator_of_its_own_does_not(tmp_path: Path) -> None:
    found = runs(tmp_path, pure=False)
    assert not found["tolerance 0"].same(found["in order"])


def test_a_script_without_the_optimizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('nothing')")
    with pytest.raises(SystemExit, match="made no ParallelPicardOptimizer"):
        run_script(tmp_path / "train.py", "in order", None, tmp_path / "run.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_command_prints_a_table(
    processes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = SCRIPT.format(pure=True).replace(
        "parameter =",
        "import os, picardopt\nif 'RANK' in os.environ: picardopt.init_process_group()\nparameter =",
    )
    (tmp_path / "train.py").write_text(source)
    monkeypatch.setattr(
        "sys.argv", ["check.py", "--processes", processes, str(tmp_path / "train.py")]
    )
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    assert "the same bits" in capfd.readouterr().out
