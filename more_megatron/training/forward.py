"""The forward step: a micro-batch through the model, with the depth it is to be computed at; and its loss."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers

from more_megatron.config import MoREConfig
from more_megatron.model.attached_loss import scale_attached_losses
from more_megatron.model.depth import DepthSampler
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.systems import get_system
from more_megatron.training.batch import Batch, next_batch
from more_megatron.training.datasets import run_tasks
from more_megatron.training.evaluation import evaluated_steps
from more_megatron.training.problems import greedy_tokens
from more_megatron.training.row_length import row_length

_SPIKE_FACTOR = 10

_straggler_timer = StragglerDetector()


def forward_step(data_iterator: Iterator, model: GPTModel) -> tuple[torch.Tensor, Callable]:
    """Run one micro-batch through this pipeline stage, whose model may be wrapped.

    Returns:
        The stage's output, [s, b, h], on the last stage the token losses, [b, s]; and the loss function to apply to it.
    """
    gpt = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    args, timers = get_args(), get_timers()
    # Evaluation reads whole samples, whatever rows the curriculum asks for.
    length = row_length(args) if gpt.training else args.seq_length
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        batch = next_batch(data_iterator, gpt.config, gpt.vp_stage)
        batch = batch if length == args.seq_length else batch.cut(length)
    timers("batch-generator").stop()
    micro_batch = _micro_batch(gpt, batch, length)
    if gpt.config.num_moe_experts is None:
        scale_attached_losses(gpt.config, get_num_microbatches())
    predicted: list[torch.Tensor] = []
    with _straggler_timer, _greedy_into(predicted, gpt, batch):
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask if batch.problems is None else batch.problems.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed_seq_params,
            extra_block_kwargs=micro_batch.block_kwargs(),
        )
    figures: dict[str, float] = {}
    if gpt.training and get_system(gpt.config.more_variant).recurrent:
        figures["recurrence steps"] = micro_batch.depth.steps
    if gpt.training and args.seq_length_curriculum is not None:
        figures["sequence length"] = length
    return output, functools.partial(_loss, batch, predicted, figures)


def _greedy_into(
    predicted: list[torch.Tensor], gpt: GPTModel, batch: Batch
) -> contextlib.AbstractContextManager[object]:
    """Return a block in which the likeliest tokens, [b, s], are collected where answers are evaluated."""
    if batch.problems is None or gpt.training or not gpt.post_process:
        return contextlib.nullcontext()

    def collect(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        predicted.append(greedy_tokens(output[0]))

    return gpt.output_layer.register_forward_hook(collect)


def _loss(
    batch: Batch, predicted: list[torch.Tensor], figures: dict[str, float], losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the losses of tokens, the number of those that count, and sum and weight of what is reported.

    Args:
        batch: The micro-batch, on the last pipeline stage, which alone computes losses.
        predicted: The likeliest tokens, [b, s], where answers are evaluated; else nothing.
        figures: What else is reported of the micro-batch, by name.
        losses: Cross-entropy of each token in nats, [b, s].
    """
    assert batch.loss_mask is not None
    mask = batch.loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if evaluated_steps() is None:
        _check(loss)
    report = {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}
    for name, value in figures.items():
        # Made on the host and copied there it would wait for the forward pass.
        report[name] = torch.cat([loss.new_full((1,), value), loss.new_ones(1)])
    if predicted and batch.problems is not None and batch.labels is not None:
        is_right = predicted[0].eq(batch.labels)
        report |= batch.problems.report(run_tasks(get_args()), batch.loss_mask, losses.detach(), is_right)
    return loss, tokens, report


def _check(loss: torch.Tensor) -> None:
    """Hand the loss to Megatron's checks for NaN, infinity and spikes."""
    args, machine = get_args(), get_rerun_state_machine()
    check = functools.partial(machine.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        check(rejection_func=torch.isnan, message="found NaN in local forward loss calculation", fatal=True)
        check(rejection_func=torch.isinf, message="found Inf in local forward loss calculation", fatal=True)
    if args.check_for_spiky_loss:
        is_spike = functools.partial(machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss")
        check(rejection_func=is_spike, message="Spiky loss", fatal=False)


def _micro_batch(gpt: GPTModel, batch: Batch, length: int) -> MicroBatch:
    """Return the depth and the sample ids of the micro-batch whose forward pass begins, with rows of this length."""
    args = get_args()
    config: MoREConfig = gpt.config
    sampler = DepthSampler(config)
    starts = None if batch.problems is None else batch.problems.host_starts
    if not gpt.training:
        return MicroBatch(sampler.evaluation(evaluated_steps()), starts=starts)
    index = _number_in_step(gpt)
    replica = mpu.get_data_parallel_rank()
    first = args.consumed_train_samples + (index * args.data_parallel_size + replica) * args.micro_batch_size
    rows = args.seq_length // length
    ids = range(first * rows, (first + args.micro_batch_size) * rows)
    return MicroBatch(sampler.draw(args.curr_iteration, index), tuple(ids), starts)


def _number_in_step(gpt: GPTModel) -> int:
    """Return the number of the micro-batch within its step, from 0: every stage takes them in their order."""
    step = get_args().curr_iteration
    former_step, count = getattr(gpt, "micro_batches_seen", (step, 0))
    count = count if step == former_step else 0
    gpt.micro_batches_seen = (step, count + 1)
    # A step that is computed again begins anew.
    return count % get_num_microbatches()
