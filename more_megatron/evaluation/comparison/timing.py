"""How fast the arms of a plan train, in short timings taken in turn: runs themselves share the machine with others."""

import json
from pathlib import Path

from more_megatron.evaluation.command_lines import as_typed
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.unfinished import write_whole

# The first step allocates gradients, which are not to count.
_ROUNDS, _WARMUP = 5, 2


def save_timings(plan: Plan, path: Path) -> None:
    """Write to a file what forward and backward passes at the mean depth take, a table for each arm and point.

    The optimizer is left out. Imports Megatron, and sets its globals.
    """
    from more_megatron.evaluation.matching import Described
    from more_megatron.evaluation.step_benchmark import StepBenchmark, time_systems

    found = []
    for point, _ in enumerate(plan.points):
        arms = [arm for arm in plan.arms if arm.point == point and arm.refusal is None]
        models = {arm.name: Described.by(as_typed(arm.flags)) for arm in arms}
        benchmarks = {name: StepBenchmark(model, model.args.micro_batch_size) for name, model in models.items()}
        timed = time_systems(benchmarks, _ROUNDS, _WARMUP)
        found += [
            {
                "arm": each.name,
                "point": point,  # number of the point of the sweep
                "seconds": each.median_seconds,
                "tokens_per_second": each.tokens_per_second,
                "achieved_flops": each.achieved_flops,
                "ratio": each.ratio_to(timed[0]),
                "step_bytes": each.step_bytes,
            }
            for each in timed
        ]
    write_whole(path, json.dumps(found, indent=1))
