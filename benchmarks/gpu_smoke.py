"""Checks and timings that need a GPU; everything else in the project is tested without one.

    python benchmarks/gpu_smoke.py --out benchmarks/results/gpu.md

Checks: at tolerance 0 the run is bitwise the sequential one, with Adam's kinds of kernel, by one
process, by two that share a GPU (gloo) and by one process for each of several GPUs (NCCL); the
device's generator is left as it was; the text-to-3D command. Timings: the parts of a sweep.
`--device cpu` runs the same code without a GPU, to check this script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# cuBLAS reads it when its first handle is made; without it matrix products may differ by run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from gpu_runs import PROBLEMS, STEPS, WINDOW, Outcome, network, optimizers, train
from tables import document, machine, markdown, number

from picardopt import ParallelPicardOptimizer, launch


@dataclass(frozen=True)
class Check:
    """One finding: True passed, False failed, None could not be run here."""

    name: str
    passed: bool | None
    detail: str


def verdict(name: str, problem: str, found: Outcome, expected: Outcome) -> Check:
    """Bitwise equal, and really ahead where the problem allows it."""
    wrong = found.differs_from(expected)
    detail = f"{found.sweeps} sweeps for {STEPS} steps, longest stride {max(found.strides)}"
    if wrong:
        return Check(name, False, f"{wrong} of {len(expected.tensors)} tensors differ; {detail}")
    if problem == "signs" and not (max(found.strides) >= 2 and found.sweeps < STEPS):
        return Check(name, False, f"equal, but never ahead; {detail}")
    return Check(name, True, f"bitwise; {detail}")


def check_exactness(device: torch.device) -> list[Check]:
    """Tolerance 0 against the sequential loop, in one process."""
    checks = []
    for problem in PROBLEMS:
        for kind, options in optimizers(device).items():
            expected = train(problem, options, device, window=0)
            found = train(problem, options, device, window=WINDOW)
            checks.append(verdict(f"one process, {problem}, {kind}", problem, found, expected))
    return checks


def check_generators(device: torch.device) -> list[Check]:
    """Checks that a step leaves the generators of the device and of the host as they were."""
    model, compute_loss = network(device)
    optimizer = ParallelPicardOptimizer(
        torch.optim.Adam(model.parameters()), window=WINDOW, total_steps=STEPS
    )

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss

    def read() -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    torch.manual_seed(11)
    torch.rand(5, device=device)
    before = read()
    for _ in range(WINDOW):
        optimizer.step(closure)
    same = all(torch.equal(a, b) for a, b in zip(before, read(), strict=True))
    return [Check("generators restored", same, f"{len(before)} generators, {WINDOW} steps")]


def rank_outcomes(problem: str, options: dict, kind: str, share: bool) -> Outcome:
    """One rank of a parallel run."""
    make_deterministic()
    index = 0 if share else dist.get_rank()
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    return train(problem, options, device, window=None)


def check_ranks(device: torch.device, workers: int, name: str, share: bool) -> list[Check]:
    """Several processes against the sequential loop; every rank must hold the same."""
    checks = []
    for problem in PROBLEMS:
        for kind in ("foreach", "fused"):
            options = optimizers(device)[kind]
            expected = train(problem, options, device, window=0)
            found = launch(
                rank_outcomes, workers=workers, args=(problem, options, device.type, share)
            )
            label = f"{name}, {workers} ranks, {problem}, {kind}"
            checks += [
                verdict(f"{label}, rank {rank}", problem, outcome, expected)
                for rank, outcome in enumerate(found)
            ]
    return checks


def check_shared_device(device: torch.device) -> list[Check]:
    """More workers than GPUs: `launch` then chooses gloo, and they share the first one."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    return check_ranks(device, count + 1 if count else 2, "gloo, one device", share=True)


def check_nccl(device: torch.device) -> list[Check]:
    """One process for each GPU: `launch` then chooses NCCL."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        return [Check("NCCL", None, f"needs 2 GPUs, found {count}")]
    return check_ranks(device, count, "NCCL", share=False)


def check_command(device: torch.device) -> list[Check]:
    """The text-to-3D command, from prompt to report."""
    command = Path(sysconfig.get_path("scripts"), "picardopt")
    if not command.is_file():
        return [Check("text-to-3d", None, f"{command} is missing: install both distributions")]
    with tempfile.TemporaryDirectory() as folder:
        line = [str(command), "text-to-3d", "a red cube", "--out", folder]
        line += ["--device", device.type]
        start = time.perf_counter()
        done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
        seconds = time.perf_counter() - start
        if done.returncode:
            return [Check("text-to-3d", False, done.stderr.strip()[-2000:])]
        report = json.loads(Path(folder, "report.json").read_text())
    names = ("device", "workers", "window", "steps", "sweeps", "mean_stride", "seconds", "psnr")
    figures = ", ".join(f"{name} {report[name]}" for name in names if name in report)
    on_device = str(report.get("device", device.type)).startswith(device.type)
    return [Check("text-to-3d", on_device, f"{seconds:.0f} s in all; {figures}")]


def time_parts(device: torch.device, sizes: Sequence[int]) -> str:
    """A table of a sweep's parts by number of parameters; Adam foreach and fused."""
    rows = []
    for numel in sizes:
        for kind in ("foreach", "fused"):
            rows.append([f"{numel:,}", kind, *map(number, time_sweep(numel, kind, device))])
    headers = ("parameters", "Adam", "drift", "rollout", "commits", "sweep", "plain step")
    return markdown(headers, rows)


def time_sweep(numel: int, kind: str, device: torch.device, sweeps: int = 5) -> list[float]:
    """Milliseconds per sweep of WINDOW slots: drift, rollout, commits, wall; and of a plain step."""
    parameters = [torch.randn(numel // 10, device=device, requires_grad=True) for _ in range(10)]
    base = torch.optim.Adam(parameters, lr=1e-3, **optimizers(device)[kind])
    optimizer = ParallelPicardOptimizer(
        base, window=WINDOW, tolerance=float("inf"), audit="never", total_steps=10**6
    )

    def closure() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = torch.stack([p.square().mean() for p in parameters]).sum()
        loss.backward()
        return loss

    def run(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count * WINDOW):
            optimizer.step(closure)
        synchronize(device)
        return 1e3 * (time.perf_counter() - start) / count

    run(2)
    before = dict(optimizer.stats.seconds)
    wall = run(sweeps)
    parts = [
        1e3 * (optimizer.stats.seconds[name] - before[name]) / sweeps
        for name in ("drift", "rollout", "commit")
    ]
    closure()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(20):
        base.step()
    synchronize(device)
    return [*parts, wall, 1e3 * (time.perf_counter() - start) / 20]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_deterministic() -> None:
    """Kernels whose sums depend on timing would differ between two sequential runs as well."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def guarded(check: Callable[[torch.device], list[Check]], device: torch.device) -> list[Check]:
    """A part that breaks is a failed check; the others still run."""
    try:
        return check(device)
    except Exception:
        return [Check(check.__name__, False, traceback.format_exc(limit=-3).strip())]


NOTES = """
Checks at tolerance 0 compare parameters, losses and the optimizer's state bit by bit with the
sequential loop. Timings: milliseconds of one sweep of {window} slots in one process, everything
accepted, on a quadratic loss; kernels run behind the host's back, so a part's time is what the host
spent on it, and only *sweep* and *plain step* wait for the device.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    sizes = [100_000, 1_000_000, 10_000_000, 100_000_000]
    parser.add_argument("--parameters", type=int, nargs="+", default=sizes, help="of the timings")
    parser.add_argument("--out", type=Path, help="also write what was found to this Markdown file")
    parser.add_argument("--skip-command", action="store_true", help="leave text-to-3d out")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_smoke: torch {torch.__version__} finds no CUDA device here; nothing was checked. "
            "Run it where there is one, with a CUDA build of torch (`make env TORCH=...`).",
            file=sys.stderr,
        )
        return 2
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    where = machine()
    make_deterministic()
    parts = [check_exactness, check_generators, check_shared_device, check_nccl]
    parts += [] if options.skip_command else [check_command]
    checks: list[Check] = []
    for part in parts:
        for check in guarded(part, device):
            checks.append(check)
            print(f"{WORDS[check.passed]:8} {check.name}: {check.detail}", flush=True)
    rows = [[check.name, WORDS[check.passed], check.detail] for check in checks]
    table = (
        markdown(("check", "result", "detail"), rows)
        + "\n\n"
        + time_parts(device, options.parameters)
    )
    command = " ".join(["python benchmarks/gpu_smoke.py", *sys.argv[1:]])
    text = document("On an accelerator", command, where, NOTES.format(window=WINDOW), table)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print("\n" + text)
    return int(any(check.passed is False for check in checks))


WORDS = {True: "passed", False: "FAILED", None: "not run"}


if __name__ == "__main__":
    sys.exit(main())
