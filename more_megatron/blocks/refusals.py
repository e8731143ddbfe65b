"""What recurrence and experts of our own cannot do, each one line for `System.refusals`.

A line goes on from the name of the system: "needs ...", "does not ...". Nothing here needs Megatron before it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from more_megatron.flags import flag

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig


# Of `--recompute-modules`, those that hold parameters and are differentiated in a backward pass of their own.
_RECOMPUTED_PARTS = ("layernorm", "mlp", "moe", "shared_experts")


def recurrence_refusals(config: MoREConfig) -> Iterator[str]:
    """Yield what no recurrence serves: splits and schedules that expect a layer to run once on whole rows."""
    if config.context_parallel_size > 1:
        yield f"does not support --context-parallel-size {config.context_parallel_size}: use 1"
    if config.overlap_moe_expert_parallel_comm:
        yield "runs its experts as a whole: leave out --overlap-moe-expert-parallel-comm"
    if config.cuda_graph_impl != "none":
        yield "varies its steps and rows, which no CUDA graph can: leave out --cuda-graph-impl"
    if config.fp8 is not None and "moe" in _recomputed_modules(config):
        yield (
            "recomputes its MoE part outside of FP8: give --recompute-granularity full, or leave moe out of "
            "--recompute-modules"
        )


def repetition_refusals(config: MoREConfig, repeated: tuple[str, ...]) -> Iterator[str]:
    """Yield what cannot be done where Megatron's modules run in every step.

    `repeated` are those of `--recompute-modules` that hold parameters and run in every step.
    """
    recomputed = sorted(_recomputed_modules(config).intersection(repeated))
    varies = config.recurrence_sampling != "fixed" or config.recurrence_curriculum is not None
    # Megatron reduces a bucket of gradients when each has arrived as often as in the first step.
    if config.overlap_grad_reduce and recomputed and varies:
        yield (
            f"with --overlap-grad-reduce and --recompute-modules {' '.join(recomputed)} needs the same number of "
            "gradient steps throughout: give --recompute-granularity full, or --recurrence-sampling fixed without a "
            "curriculum"
        )


def loop_refusals(config: MoREConfig) -> Iterator[str]:
    """Yield what cannot be done where whole layers are repeated, dense or with experts."""
    yield from recurrence_refusals(config)
    yield from repetition_refusals(config, _RECOMPUTED_PARTS)
    if config.cpu_offloading:
        yield "runs a layer several times, which --cpu-offloading-num-layers does not count: leave it out"
    if config.mtp_num_layers:
        yield "has no layer that runs once to predict further tokens with: leave out --mtp-num-layers"
    balancing = config.moe_router_load_balancing_type
    kinds = [balancing] if isinstance(balancing, str) else balancing
    if config.recompute_granularity == "full" and "global_aux_loss" in kinds:
        yield (
            "would count recomputed passes in --moe-router-load-balancing-type global_aux_loss: give "
            "--recompute-granularity selective, or aux_loss"
        )
    if config.num_moe_experts is None:
        for name in ("router_logit_ema", "router_min_entropy"):
            if getattr(config, name) > 0.0:
                yield f"has no routers without --num-experts: give it, or leave out {flag(name)}"


def _recomputed_modules(config: MoREConfig) -> set[str]:
    return set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()


def mixing_refusals(config: MoREConfig) -> Iterator[str]:
    """Yield what experts cannot do that let tokens attend to each other."""
    from more_megatron.blocks.dispatch import DISPATCHERS

    expert_ranks = config.expert_model_parallel_size * config.expert_tensor_parallel_size
    tensor_ranks = config.tensor_model_parallel_size
    if expert_ranks % tensor_ranks != 0:
        yield (
            f"needs all tokens of a sequence on one expert rank: --expert-model-parallel-size "
            f"{config.expert_model_parallel_size} times --expert-tensor-parallel-size "
            f"{config.expert_tensor_parallel_size} must be a multiple of --tensor-model-parallel-size {tensor_ranks}; "
            "raise one of the former"
        )
    if config.moe_token_dispatcher_type not in DISPATCHERS:
        yield f"needs --moe-token-dispatcher-type {' or '.join(DISPATCHERS)}"
    if config.moe_pad_expert_input_to_capacity or config.moe_router_padding_for_quantization:
        yield (
            "mixes all rows it is given: leave out --moe-pad-expert-input-to-capacity and "
            "--moe-router-padding-for-quantization"
        )


def expert_refusals(config: MoREConfig, ffn_hidden_size: int | None) -> Iterator[str]:
    """Yield what experts that are not Megatron's cannot honour, whose recurrent block, if any, has so wide an MLP."""
    if config.add_bias_linear:
        yield "has no biases: leave out --enable-bias-linear"
    yield from _precision_refusals(config)
    if config.fp8 is None:
        return
    ranks, heads = config.expert_tensor_parallel_size or 1, config.num_attention_heads
    sizes = {
        "--hidden-size": config.hidden_size,
        "--recurrence-ffn-hidden-size over --expert-tensor-parallel-size": (ffn_hidden_size or 0) // ranks,
        "the heads of --num-attention-heads and --num-query-groups on a rank": (
            (heads + 2 * config.num_query_groups) * config.kv_channels // ranks
        ),
        "the heads of --num-attention-heads on a rank": heads * config.kv_channels // ranks,
    }
    yield from _misaligned(config, sizes)


def cell_refusals(config: MoREConfig) -> Iterator[str]:
    """Yield what experts that are or have recurrent cells cannot honour, and no recurrence."""
    yield from recurrence_refusals(config)
    if config.overlap_param_gather:
        yield "reads its weights in another order than they are gathered in: leave out --overlap-param-gather"
    yield from _precision_refusals(config)
    if config.fp8 is None:
        return
    ranks, widths = config.expert_tensor_parallel_size or 1, ("hidden_size", "moe_ffn_hidden_size")
    sizes = {f"{flag(name)} over --expert-tensor-parallel-size": getattr(config, name) // ranks for name in widths}
    yield from _misaligned(config, {"--hidden-size": config.hidden_size} | sizes)


def _precision_refusals(config: MoREConfig) -> Iterator[str]:
    if config.fp8 is not None and config.transformer_impl != "transformer_engine":
        yield "computes in FP8 with Transformer Engine only: give --transformer-impl transformer_engine"
    if config.fp8 is not None and config.fp8_recipe == "custom":
        yield "has no custom FP8 recipe: give --fp8-recipe delayed, tensorwise, blockwise or mxfp8"
    if config.fp8_param:
        yield "keeps its weights in high precision: leave out --fp8-param-gather"
    if config.fp4 is not None:
        yield "does not compute in FP4: leave out --fp4-format"
    if config.quant_recipe is not None:
        yield "has one precision for all of a layer: leave out --te-precision-config-file"
    if config.delay_wgrad_compute or config.overlap_dispatch_backward_with_experts_wgrad:
        yield (
            "computes the gradients of its weights with those of its rows: leave out --delay-wgrad-compute and "
            "--overlap-dispatch-backward-with-experts-wgrad"
        )


def _misaligned(config: MoREConfig, sizes: dict[str, int]) -> Iterator[str]:
    from megatron.core.fp8_utils import get_fp8_align_size

    multiple = get_fp8_align_size(config.fp8_recipe)
    for what, size in sizes.items():
        if size % multiple != 0:
            yield f"in FP8 needs {what}, {size}, to be a multiple of {multiple}"
