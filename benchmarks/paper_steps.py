"""One step of a stage of a `paper` preset, in the process that is asked for it: bytes and seconds."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paper_stages import Brightness, Row, build_stage, picture
from picardopt_3d.methods import Stage
from picardopt_3d.methods.reference import Reference

from picardopt import ParallelPicardOptimizer


def on_gpu(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a stage with its guidance."""
    from full_size_models import full_size_guidance

    device, step = torch.device(options.device), row.largest()
    row = row.shrunk() if options.tiny else row
    guidance = full_size_guidance(row.config, device, options.tiny)
    if options.tiny or options.batch:
        row = with_views(row, options.batch or 2, 16 if options.tiny else None)
    found: dict[str, Any] = {"model": allocated(device), "views": row.views(step)}
    for state in row.states():
        stage: Any = build_stage(row, guidance, device, step, state == "grown")
        batch = row.views(step)[0]
        while batch:
            stage.config = with_views(row, batch).config
            try:
                found[state] = one_step(stage, step, device) | {"batch": batch}
                found |= of_window(stage, row, device)
                break
            except torch.OutOfMemoryError as error:
                print(f"{row.name}, {state}, {batch} views: {error}", file=sys.stderr)
            batch //= 2
            release(device)
        del stage
        release(device)
    return found


def one_step(stage: Stage, step: int, device: torch.device) -> dict[str, float]:
    """Seconds and peak of a step, after one without an update that sets up what a device sets up once."""
    optimizers = stage.optimizers()
    for last in (False, True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        torch.manual_seed(step)
        losses = stage.loss(step)
        losses.total.backward()
        if last:
            for optimizer in optimizers:
                optimizer.step()
        finite = math.isfinite(float(losses.total.detach()))
        seconds = time.perf_counter() - begun
    if not finite:
        print(f"{type(stage).__name__}: the loss is not finite", file=sys.stderr)
    return {"seconds": seconds, "peak": peak(device)}


def of_window(stage: Stage, row: Row, device: torch.device) -> dict[str, float]:
    """Bytes of what is trained, and of what a window adds to them: a sweep of the optimizer with gradients of 0."""
    bases = stage.optimizers()
    parameters = [p for base in bases for group in base.param_groups for p in group["params"]]
    held = list(parameters) + [p.grad for p in parameters if p.grad is not None]
    for base in bases:
        held += [v for state in base.state.values() for v in state.values() if torch.is_tensor(v)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    figures = {
        "parameters": float(sum(p.numel() for p in parameters)),
        "trained": float(sum(t.numel() * t.element_size() for t in held)),
    }
    before = reset_peak(device)
    window = row.config.picard.window or 7
    optimizer = ParallelPicardOptimizer(
        bases[0] if len(bases) == 1 else bases,
        window=window,
        tolerance=float("inf"),
        total_steps=window,
        audit="never",
    )

    def closure() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=device)

    optimizer.step(closure)
    return figures | {"window": peak(device) - before}


def on_cpu(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one view of a scene, for each state a list by size."""
    torch.set_num_threads(1)
    device, step = torch.device("cpu"), row.largest()
    found: dict[str, Any] = {}
    for state in row.states():
        stage: Any = build_stage(row, Brightness(), device, step, state == "grown")
        for size in (8, *sizes_of(row, options)):  # the first one sets up what torch sets up once
            stage.config = with_views(row, 1, size).config
            if row.from_picture:
                stage.reference = Reference(
                    picture(stage.config), stage.config.reference_pixels, device
                )
            found.setdefault(state, []).append(one_view(stage, step, device))
        del found[state][0], stage
    return found


def sizes_of(row: Row, options: argparse.Namespace) -> list[int]:
    """Pixels along an edge of the views that are measured on a CPU; smaller beside a larger picture."""
    half = row.from_picture and with_views(row, 1, 64).pixels_at(0) > 2 * 64**2
    return [size // (2 if half else 1) for size in options.sizes]


def one_view(stage: Stage, step: int, device: torch.device) -> dict[str, float]:
    """Bytes that a step adds to what is resident, without gradients and with them, and its CPU seconds."""
    for optimizer in stage.optimizers():
        optimizer.zero_grad()
    torch.manual_seed(step)
    before = reset_peak(device)
    with torch.no_grad():
        stage.loss(step)
    forward = peak(device) - before
    torch.manual_seed(step)
    before = reset_peak(device)
    begun = time.process_time()
    stage.loss(step).total.backward()
    seconds = time.process_time() - begun
    return {"forward": forward, "both": peak(device) - before, "seconds": seconds}


def with_views(row: Row, batch: int, pixels: int | None = None) -> Row:
    """The row with other views at every step; the view at a picture's camera shrinks with them."""
    config: Any = replace(row.config, batch=batch)
    if pixels is not None:
        config = replace(config, pixels=pixels)
        sizes = getattr(config, "reference_pixels", None)
        if sizes is not None:
            last = sizes if isinstance(sizes, int) else sizes[-1][1]
            beside = last * pixels // row.views(row.largest())[1]
            config = replace(config, reference_pixels=max(16, beside))
    return replace(row, config=config)


def allocated(device: torch.device) -> float:
    """Bytes in use now."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated())
    return resident("VmRSS")


def peak(device: torch.device) -> float:
    """Most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    return resident("VmHWM")


def reset_peak(device: torch.device) -> float:
    """Forgets earlier peaks, and returns the bytes in use."""
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return allocated(device)


def release(device: torch.device) -> None:
    """Gives back what is not in use, so that it hides no peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def resident(name: str) -> float:
    """An entry of Linux's status of this process, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(found[1]) if found else float("nan")
