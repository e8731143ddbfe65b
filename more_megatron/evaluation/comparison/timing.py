"""How fast the arms of a plan train, in short timings taken in turn: runs themselves share the machine with others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from more_megatron.evaluation.command_lines import arguments_of
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.unfinished import write_whole

__all__ = ["read_timings", "save_timings"]

# The first step allocates gradients, which are not to count.
_ROUNDS, _WARMUP = 5, 2


def save_timings(plan: Plan, path: Path) -> None:
    """Time the arms of a plan and write the figures to a file. Imports Megatron, and sets its globals."""
    timings = [timing for point, _ in enumerate(plan.points) for timing in _at_point(plan, point)]
    write_whole(path, json.dumps(timings, indent=1))


def read_timings(path: Path) -> list[dict[str, Any]]:
    """Return the figures of a file, one table an arm and point; none if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def _at_point(plan: Plan, point: int) -> Iterator[dict[str, Any]]:
    """Yield what forward and backward passes at the mean depth take, without the optimizer."""
    from more_megatron.evaluation.runs import configure
    from more_megatron.evaluation.step_benchmark import StepBenchmark, time_systems
    from more_megatron.model.depth import DepthSampler

    benchmarks, depths = {}, {}
    for arm in plan.arms:
        if arm.point == point and arm.refusal is None:
            args, model_config = configure(shlex.join(arguments_of(arm.flags)))
            benchmarks[arm.name] = StepBenchmark(model_config, args.seq_length, args.micro_batch_size)
            depths[arm.name] = DepthSampler(model_config.transformer).expected()
    timed = time_systems(benchmarks, depths, _ROUNDS, _WARMUP)
    for each in timed:
        yield {
            "arm": each.name,
            "point": point,  # number of the point of the sweep
            "seconds": each.median_seconds,
            "tokens_per_second": each.tokens / each.median_seconds,
            "achieved_flops": each.achieved_flops,
            "ratio": each.ratio_to(timed[0]),
            "step_bytes": each.step_bytes,
        }
