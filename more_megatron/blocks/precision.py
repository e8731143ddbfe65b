"""What experts of our own cannot do in low precision, or with Megatron's schedules of gradients."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.fp8_utils import get_fp8_align_size

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError

__all__ = ["check_precision"]


def check_precision(config: MoREConfig, name: str) -> None:
    """Refuse what experts that are not Megatron's cannot honour.

    Args:
        config: Model configuration.
        name: What the user chose, for the message.

    Raises:
        MoREError: If a flag would have no effect or a wrong one; the message names it.
    """
    for fault in (*_unsupported(config), *_misaligned(config)):
        raise MoREError(f"{name} {fault}")


def _unsupported(config: MoREConfig) -> Iterator[str]:
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
    if config.overlap_moe_expert_parallel_comm:
        yield "runs its experts as a whole: leave out --overlap-moe-expert-parallel-comm"


def _misaligned(config: MoREConfig) -> Iterator[str]:
    if config.fp8 is None:
        return
    multiple = get_fp8_align_size(config.fp8_recipe)
    ranks = config.expert_tensor_parallel_size or 1
    width = config.recurrence_ffn_hidden_size or 2 * config.hidden_size
    heads = config.num_attention_heads + 2 * config.num_query_groups
    for what, size in (
        ("--hidden-size", config.hidden_size),
        ("--recurrence-ffn-hidden-size over --expert-tensor-parallel-size", width // ranks),
        ("the heads of --num-attention-heads and --num-query-groups on a rank", heads * config.kv_channels // ranks),
        ("the heads of --num-attention-heads on a rank", config.num_attention_heads * config.kv_channels // ranks),
    ):
        if size % multiple != 0:
            yield f"in FP8 needs {what}, {size}, to be a multiple of {multiple}"
