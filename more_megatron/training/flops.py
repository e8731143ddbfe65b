"""Makes Megatron's throughput line true for systems whose depth comes from recurrence."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches

from more_megatron.config import MoREConfig
from more_megatron.console import say
from more_megatron.model.costs import Cost
from more_megatron.model.depth import DepthSampler
from more_megatron.platform.memory import check_fits_devices
from more_megatron.platform.repairs.reports import count_flops_with
from more_megatron.systems import get_system

__all__ = ["count_recurrence", "print_cost", "step_flops"]

# Of a parameter: itself and its gradient in 16 bits, and the optimizer's copy and two moments.
_BYTES, _TRAINED_BYTES = 2, 16


def count_recurrence(config: MoREConfig) -> None:
    """Let `pretrain` count the operations of a system by its cost, with the depth of each training step.

    Megatron's own count knows its architectures only, and no recurrence. The baseline keeps it.
    """

    def count(args: argparse.Namespace, batch_size: int, *_: Any, **__: Any) -> float:
        return step_flops(config, args, batch_size)

    count_flops_with(None if get_system(config.more_variant).is_megatrons else count)


def step_flops(config: MoREConfig, args: argparse.Namespace, batch_size: int) -> float:
    """Return the operations of the training step that is under way, of so many sequences."""
    step = getattr(args, "curr_iteration", 0)
    no_grad_steps, grad_steps = DepthSampler(config).means(step, get_num_microbatches())
    return batch_size * args.seq_length * _cost(config, args).training_flops(no_grad_steps, grad_steps)


def print_cost(config: MoREConfig, args: argparse.Namespace) -> None:
    """Print the size of the model and what a token costs, on rank 0.

    Raises:
        MoREError: If no layout would fit the model into the memory there is.
    """
    cost = _cost(config, args)
    is_whole = not (args.skip_train or args.optimizer_cpu_offload)
    check_fits_devices(
        cost.parameters * (_TRAINED_BYTES if is_whole else _BYTES),
        f"a model of {cost.parameters / 1e9:,.0f} B parameters",
        "lower --num-layers, --hidden-size, --num-experts or --vocab-size, or take more ranks",
    )
    depth = DepthSampler(config).expected()
    say(
        f"> {config.more_variant}: {cost.parameters / 1e6:.2f} M parameters, "
        f"{cost.active_parameters / 1e6:.2f} M active a token, "
        f"{cost.training_flops(depth.no_grad_steps, depth.grad_steps) / 1e6:.2f} MFLOP a token and training step "
        f"(r = {depth.steps}, {depth.grad_steps} with gradient), seq_length {args.seq_length}"
    )


def _cost(config: MoREConfig, args: argparse.Namespace) -> Cost:
    tied = not args.untie_embeddings_and_output_weights
    return get_system(config.more_variant).model_cost(config, args.seq_length, args.padded_vocab_size, tied)
