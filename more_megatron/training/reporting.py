"""What a run of a recurrent system reports besides Megatron's own figures."""

from __future__ import annotations

import argparse

from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

from more_megatron.blocks.statistics import IterationTracker
from more_megatron.config import MoREConfig
from more_megatron.systems import get_system
from more_megatron.training.flops import count_recurrence, print_cost

__all__ = ["prepare_reports"]


def prepare_reports(config: MoREConfig, args: argparse.Namespace) -> None:
    """Print what the model costs, and let Megatron's log count recurrence and report our losses.

    Args:
        config: Model configuration.
        args: Validated arguments.
    """
    print_cost(config, args)
    count_recurrence(config)
    system = get_system(config.more_variant)
    steps = config.max_steps if system.repeats_router else 0
    set_moe_metrics_tracker(IterationTracker(steps, system.losses(config)))
