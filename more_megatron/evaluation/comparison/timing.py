"""How fast the arms of a plan train, in short timings taken in turn: runs themselves share the machine with others."""

from __future__ import annotations

import json
import shlex
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from more_megatron.evaluation.comparison.experiment import command_line
from more_megatron.evaluation.comparison.planning import Plan, PlannedArm
from more_megatron.unfinished import unfinished_file

if TYPE_CHECKING:
    from more_megatron.evaluation.step_benchmark import StepBenchmark
    from more_megatron.model.depth import Depth

__all__ = ["Timing", "read_timings", "save_timings"]

# The first step allocates gradients, which are not to count.
_ROUNDS, _WARMUP = 5, 2


@dataclass(frozen=True)
class Timing:
    """How fast an arm takes forward and backward passes at the mean depth, without the optimizer.

    Attributes:
        arm: Name of the arm.
        point: Number of the point of the sweep.
        seconds: Median time of a step.
        tokens_per_second: Tokens a second.
        achieved_flops: Operations a second.
        ratio: Median of achieved operations over those of the first arm in the same round.
        step_bytes: Memory that a step takes besides weights and their gradients.
    """

    arm: str
    point: int
    seconds: float
    tokens_per_second: float
    achieved_flops: float
    ratio: float
    step_bytes: int


def save_timings(plan: Plan, path: Path) -> None:
    """Time the arms of a plan and write the figures to a file. Imports Megatron, and sets its globals.

    Args:
        plan: The plan.
        path: The file.
    """
    timings = [timing for point, _ in enumerate(plan.points) for timing in _at_point(plan, point)]
    with unfinished_file(path) as unfinished:
        unfinished.write_text(json.dumps([asdict(timing) for timing in timings], indent=1))


def read_timings(path: Path) -> list[Timing]:
    """Return the figures of a file; none if it is not there."""
    return [Timing(**timing) for timing in json.loads(path.read_text())] if path.exists() else []


def _at_point(plan: Plan, point: int) -> list[Timing]:
    from more_megatron.evaluation.step_benchmark import time_systems

    arms = [arm for arm in plan.arms if arm.point == point and arm.refusal is None]
    built = {arm.name: _benchmark(arm) for arm in arms}
    benchmarks = {name: benchmark for name, (benchmark, _, _) in built.items()}
    depths = {name: depth for name, (_, depth, _) in built.items()}
    found: list[Timing] = []
    first: list[float] = []
    for timed in time_systems(benchmarks, depths, _ROUNDS, _WARMUP):
        tokens, seconds = built[timed.name][2], statistics.median(timed.seconds)
        achieved = timed.achieved_flops(tokens)
        first = first or achieved
        ratio = statistics.median(own / other for own, other in zip(achieved, first, strict=True))
        median = statistics.median(achieved)
        found.append(Timing(timed.name, point, seconds, tokens / seconds, median, ratio, timed.step_bytes))
    return found


def _benchmark(arm: PlannedArm) -> tuple[StepBenchmark, Depth, int]:
    """Return a model with a batch, its mean depth, and the tokens of the batch."""
    from more_megatron.evaluation.runs import configure, sole_rank
    from more_megatron.evaluation.step_benchmark import StepBenchmark
    from more_megatron.model.depth import DepthSampler

    args, model_config = configure(shlex.join(command_line(arm.flags)))
    sole_rank()
    benchmark = StepBenchmark(model_config, args.seq_length, args.micro_batch_size)
    tokens = args.seq_length * args.micro_batch_size
    return benchmark, DepthSampler(model_config.transformer).expected(), tokens
