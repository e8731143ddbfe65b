"""What a run reports besides Megatron's own figures: what the model costs, and figures of its system."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from more_megatron.blocks.statistics import LossTracker
from more_megatron.config import MoREConfig
from more_megatron.console import say
from more_megatron.model.costs import Cost
from more_megatron.model.depth import DepthSampler
from more_megatron.monitoring.figures import Figures, report_to, write_scalars
from more_megatron.platform.memory import check_fits_devices
from more_megatron.platform.training_loop import surround
from more_megatron.systems import get_system
from more_megatron.training.evaluation import evaluate_at_depths
from more_megatron.training.health import watch_health
from more_megatron.training.row_length import announce_row_length

# Of a parameter: itself and its gradient in 16 bits, and the optimizer's copy and two moments.
_BYTES, _TRAINED_BYTES = 2, 16


def prepare_reports(config: MoREConfig, args: argparse.Namespace) -> None:
    """Print what the model costs, and let Megatron's log count recurrence and report our losses, figures and health."""
    print_cost(config, args)
    _count_recurrence(config)
    set_moe_metrics_tracker(LossTracker(get_system(config.more_variant).losses(config)))
    extend_loop(config, args)


def extend_loop(config: MoREConfig, args: argparse.Namespace) -> None:
    """Let Megatron's training loop do what it cannot by itself: figures, depths in evaluation, short rows, health."""
    report_figures(get_system(config.more_variant).figures(config))
    if config.recurrence_eval_depths or args.loss_on_answers:
        evaluate_at_depths(config)
    if args.seq_length_curriculum is not None:
        announce_row_length()
    watch_health(config, args)


def _count_recurrence(config: MoREConfig) -> None:
    """Let the log count the operations of a system by its cost, with the depth of the training step under way.

    The baseline keeps Megatron's count.
    """

    def count(former: Any, args: argparse.Namespace, batch_size: int, *_: Any, **__: Any) -> float:
        step = getattr(args, "curr_iteration", 0)
        no_grad_steps, grad_steps = DepthSampler(config).means(step, get_num_microbatches())
        return batch_size * args.seq_length * _cost(config, args).training_flops(no_grad_steps, grad_steps)

    if not get_system(config.more_variant).is_megatrons:
        surround("num_floating_point_operations", count)


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


def report_figures(names: tuple[str, ...]) -> None:
    """Let Megatron's log report figures of these names, whenever a log line is due."""
    figures = Figures(names)
    report_to(figures)
    if names:
        surround("training_log", functools.partial(_log_with_figures, figures))


def _log_with_figures(
    figures: Figures,
    training_log: Callable[..., Any],
    loss_dict: dict[str, Any],
    total_loss_dict: dict[str, Any],
    learning_rate: float | None,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Take the place of Megatron's `training_log`, whose arguments these are."""
    is_due = iteration % get_args().log_interval == 0
    if is_due or kwargs.get("is_first_iteration", False):
        means = figures.means()
        write_scalars(means, iteration, get_tensorboard_writer(), get_wandb_writer())
        # The log line has the sum of each entry over the steps since the line before, divided by their number. The
        # step under way is not counted yet; if it was skipped, Megatron's third argument after these says so.
        _, _, skipped = args[:3]
        steps = max(1, int(total_loss_dict.get("advanced iterations", 0)) + int(not skipped))
        for name, mean in means.items():
            if "/" not in name:
                total_loss_dict[name] = torch.tensor([mean * steps])
        # Megatron's sums begin anew in the same way: behind a first line too, if it would have come anyway.
        if is_due:
            figures.clear()
    return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
