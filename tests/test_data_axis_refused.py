"""What a mesh with a data axis refuses: DistributedDataParallel over other ranks, sharded parameters, wrong meshes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from picardopt import ParallelPicardOptimizer
from tests.helpers.meshes import BASES, Network, make_closure
from tests.helpers.pool import Pools
from tests.helpers.problems import Problem
from tests.helpers.runs import (
    Trace,
    attempt,
)
from tests.helpers.versions import needs_torch


def wrongly_wrapped(how: str) -> dict[str, Any]:
    """DistributedDataParallel over ranks that evaluate different steps."""
    model, options = Network(), {}
    if how == "mesh":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("picard", "data"))
        options = {"mesh": mesh}
    if how == "alone":
        groups = [dist.new_group([rank]) for rank in range(2)]
        options = {"process_group": groups[dist.get_rank()]}
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = ParallelPicardOptimizer(
        BASES["Adam"](model.parameters()), window=2, audit="never", **options
    )
    closure = make_closure(called, optimizer)
    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, 3)


@pytest.mark.parametrize("how", ["default group", "mesh", "alone"])
def test_ddp_without_its_mesh_is_refused(pools: Pools, how: str) -> None:
    """Else gradients of different steps would be averaged, and no one would know."""
    for report in pools(2).run(wrongly_wrapped, how):
        assert report["error"] == "ValueError"
        assert "DistributedDataParallel module over ranks [0, 1]" in report["message"]
        assert 'mesh_dim_names=("picard", "data")' in report["message"]
        assert report["committed"] == 0


def sharded(how: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    error, message = "", ""
    try:
        optimizer = ParallelPicardOptimizer(torch.optim.Adam(model.parameters()), mesh=mesh)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.randn(2, 4)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    except Exception as caught:
        error, message = type(caught).__name__, str(caught)
    return {"error": error, "message": message}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("fully_shard", marks=needs_torch("2.6", "torch.distributed.fsdp.fully_shard")),
        "tensor parallel",
    ],
)
def test_sharded_parameters_are_refused(pools: Pools, how: str) -> None:
    for report in pools(2).run(sharded, how):
        assert report["error"] == "UnsupportedOptimizerError", report
        assert "shard" in report["message"]
        assert "mesh=" in report["message"]


# --- Arguments ------------------------------------------------------------------------------------


def refused() -> dict[str, str]:
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("picard",))
    named = init_device_mesh("cpu", (2, 1), mesh_dim_names=("picard", "data"))
    wrong = {
        "both": {"mesh": flat, "process_group": dist.group.WORLD},
        "names": {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))},
        "no names": {"mesh": init_device_mesh("cpu", (2,))},
        "type": {"mesh": "picard"},
        "group of two dims": {"process_group": named},
    }
    told = {}
    for name, options in wrong.items():
        try:
            ParallelPicardOptimizer(BASES["Adam"](Network().parameters()), **options)
        except (TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def test_meshes_that_are_refused(pools: Pools) -> None:
    for told in pools(2).run(refused):
        assert told["both"].startswith("ValueError: mesh and process_group")
        assert '"picard" and "data"' in told["names"]
        assert '"picard" and "data"' in told["no names"]
        assert told["type"].startswith("TypeError: mesh='picard'")
        assert told["group of two dims"].startswith("ValueError: process_group=")


def test_alone_there_is_one_part() -> None:
    optimizer = ParallelPicardOptimizer(BASES["Adam"](Network().parameters()))
    assert (optimizer.data_rank, optimizer.data_size) == (0, 1)
