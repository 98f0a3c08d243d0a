"""Every script in benchmarks/ runs at a tiny size. Those that have no tiny size show their options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = {"tables", "plain_loop", "result_store", "curves", "full_size_models", "paper_stages"}
MODULES |= {"paper_steps", "small_scenes"}
MODULES |= {"beyond_tables", "beyond_tasks", "plan_tables", "plan_tasks", "unet_task"}
MODULES |= {"gpu_runs", "method_runs", "prompt_tables", "winner_cells"}
"""What the scripts share."""
TINY = {
    "beyond_3d": [
        *("--steps", "4", "--windows", "1", "8", "--rules", "sequential", "drift error"),
        *("--out", "r.json", "--cache", "cache"),
    ],
    "batched_calls": [
        *("--scenes", "voxels", "--batches", "1", "--window", "2", "--rounds", "1"),
        *("--warm-up", "4", "--out", "r.md"),
    ],
    "gaussians_restructure": [
        *(
            "--texts",
            "a red cube",
            "--seeds",
            "1",
            "--steps",
            "10",
            "--every",
            "3",
            "--window",
            "2",
        ),
        *("--out", "r.json"),
    ],
    "gpu_all": [
        *("--device", "cpu", "--small", "--out", "gpu"),
        *("--parts", "curve", "methods", "tests"),  # the others are below
    ],
    "gpu_curve": ["--help"],  # by gpu_all
    "gpu_drift": [
        *("--device", "cpu", "--small", "--batches", "1", "--compiled"),
        *("--parameters", "1000", "--sweeps", "3", "--out", "r.md"),
    ],
    "gpu_methods": ["--help"],  # by gpu_all
    "gpu_smoke": ["--device", "cpu", "--parameters", "1000", "--skip-command"],
    "mesh_rasterizer": ["--subdivisions", "0", "--sizes", "16", "--repeats", "1"],
    "methods": ["--help"],  # whole recipes, or none
    "moving_window": [
        *("--steps", "6", "--window", "3", "--size", "16", "--out", "."),
    ],
    "overhead": ["--ranks", "1", "2", "--parameters", "1000", "--curve", "1:1", "--repeats", "2"],
    "paper_memory": ["--tiny", "--stages", "dreamgaussian/gaussians", "--out", "r.md"],
    "rasterizer": ["--counts", "1", "20", "--sizes", "16", "--repeats", "1"],
    "plan_check": [
        *("--tasks", "easy", "lora", "--steps", "30", "--windows", "4", "8", "--out", "r.json"),
        *("--parameters", "1000", "--repeats", "24", "--cache", "cache"),
    ],
    "prompts": ["--steps", "2", "--seeds", "1", "--out", "r.json", "--scenes", "scenes"],
    "recipe_curves": ["--only", "dreamfusion/small", "--steps", "48", "--out", "r.json"],
    "restructure": ["--steps", "12", "--every", "5", "--windows", "3", "--seeds", "2"],
    "rounds": [
        *("--guidance", "exact", "--steps", "4", "--seeds", "2", "--only", "window 8"),
        *("--out", "r.json", "--scenes", "scenes"),
    ],
    "slow_link": ["--help"],  # by tests/test_several_hosts.py, where hosts can be made
    "step_cost": ["--seconds", "0", "--cases", "1000x2", "--out", "r.md"],
    "winner_map": ["--out", "r.json", "--image", "r.png"],
    "tolerances": ["--help"],  # whole stages, or none
    "side_by_side": ["--help"],  # of runs that `methods` made
}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_script_is_here() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("test_")}
    assert scripts == TINY.keys() | MODULES


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TINY)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, str(FOLDER / f"{name}.py"), *TINY[name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_timed_tests_run(tmp_path: Path) -> None:
    out = run(
        FOLDER.parent,
        *("-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"),
    )
    assert "passed" in out
