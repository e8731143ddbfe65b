"""What a run of a recurrent system reports besides Megatron's own figures."""

from __future__ import annotations

import argparse

from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

from more_megatron.blocks.statistics import IterationTracker
from more_megatron.config import MoREConfig
from more_megatron.training.flops import count_recurrence, print_cost
from more_megatron.variants import get_variant

__all__ = ["prepare_reports"]


def prepare_reports(config: MoREConfig, args: argparse.Namespace) -> None:
    """Print what the model costs, and let Megatron's log count recurrence and report our losses.

    Args:
        config: Model configuration.
        args: Validated arguments.
    """
    print_cost(config, args)
    count_recurrence(config)
    losses = []
    if config.router_min_entropy > 0.0:
        losses.append("entropy_loss")
    if config.projection_orthogonality_coeff > 0.0:
        losses.append("orthogonality_loss")
    iterates = get_variant(config.more_variant).iterates_router
    set_moe_metrics_tracker(IterationTracker(config.max_steps if iterates else 0, tuple(losses)))
