"""Who evaluates a window: one process, or the ranks of a process group."""

from picardopt.engines.base import Claim, Engine
from picardopt.engines.distributed import DistributedEngine
from picardopt.engines.serial import SerialEngine

__all__ = ["Claim", "DistributedEngine", "Engine", "SerialEngine"]
