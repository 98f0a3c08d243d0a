"""Parallel-in-time training: run any torch optimizer ahead of itself across devices, exactly."""

from picardopt.batched import batched as batched
from picardopt.carry import Carry as Carry
from picardopt.checkpoint import load_checkpoint as load_checkpoint
from picardopt.checkpoint import save_checkpoint as save_checkpoint
from picardopt.data import StepIndexedLoader as StepIndexedLoader
from picardopt.drift_tolerance import DriftTolerance as DriftTolerance
from picardopt.errors import BatchedCallError as BatchedCallError
from picardopt.errors import CheckpointError as CheckpointError
from picardopt.errors import DesynchronizedError as DesynchronizedError
from picardopt.errors import ImpureClosureError as ImpureClosureError
from picardopt.errors import NoGradientError as NoGradientError
from picardopt.errors import NonFiniteGradientError as NonFiniteGradientError
from picardopt.errors import PicardError as PicardError
from picardopt.errors import PicardWarning as PicardWarning
from picardopt.errors import RankLostError as RankLostError
from picardopt.errors import RankMismatchError as RankMismatchError
from picardopt.errors import RemoteClosureError as RemoteClosureError
from picardopt.errors import UnsupportedOptimizerError as UnsupportedOptimizerError
from picardopt.errors import WindowMemoryError as WindowMemoryError
from picardopt.launch import init_process_group as init_process_group
from picardopt.launch import launch as launch
from picardopt.optimizer import ParallelPicardOptimizer as ParallelPicardOptimizer
from picardopt.probe import needed_memory as needed_memory
from picardopt.probe import plan as plan
from picardopt.recommendation import Plan as Plan
from picardopt.restructure import Restructure as Restructure
from picardopt.rng import step_rng as step_rng
from picardopt.source import StepIndexedSource as StepIndexedSource
from picardopt.stats import Stats as Stats
from picardopt.tolerance import AdaptiveTolerance as AdaptiveTolerance
from picardopt.tolerance import FixedTolerance as FixedTolerance
from picardopt.tolerance import StepRelativeTolerance as StepRelativeTolerance

__version__ = "0.2.0"
