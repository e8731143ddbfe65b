"""Synthesis I, option B as in the implementation summary.

Light experts (h -> 2h, GELU, 2h -> h, dropout) are combined; then one recurrent block runs over the whole sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends

__all__ = ["SYSTEM"]


class CombinedBlock(System):
    """Light experts first, then one recurrent block over the sequence."""

    name = "shared_block_ffn"
    summary = "light experts, combined; then one recurrent block over the sequence"
    reads = DEPTH | {"recurrence_state_std", "recurrence_ffn_hidden_size"}
    block_width = 4
    expert_rows = (
        Row("mlp.experts.fc1", "mlp.experts.fc1", "N 2*h h"),
        Row("mlp.experts.fc2", "mlp.experts.fc2", "N h 2*h"),
        Row("mlp.recurrent_block.adapter", "mlp.recurrent_block.adapter", "h 2*h"),
        Row("mlp.recurrent_block.attention.linear_qkv.weight", "mlp.recurrent_block.qkv", "qkv h"),
        Row("mlp.recurrent_block.attention.linear_qkv.bias", "mlp.recurrent_block.qkv_bias", "qkv", when="qkv_bias"),
        Row("mlp.recurrent_block.attention.linear_proj.weight", "mlp.recurrent_block.proj", "h q"),
        Row("mlp.recurrent_block.mlp.linear_fc1.weight", "mlp.recurrent_block.fc1", "2*R h", view="2 R h"),
        Row("mlp.recurrent_block.mlp.linear_fc2.weight", "mlp.recurrent_block.fc2", "h R"),
        Row("mlp.recurrent_block.norm_1.weight", "mlp.recurrent_block.norm_1", "h"),
        Row("mlp.recurrent_block.norm_1.bias", "mlp.recurrent_block.norm_1_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_2.weight", "mlp.recurrent_block.norm_2", "h"),
        Row("mlp.recurrent_block.norm_2.bias", "mlp.recurrent_block.norm_2_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_3.weight", "mlp.recurrent_block.norm_3", "h"),
        Row("mlp.recurrent_block.norm_3.bias", "mlp.recurrent_block.norm_3_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_4.weight", "mlp.recurrent_block.norm_4", "h"),
        Row("mlp.recurrent_block.norm_4.bias", "mlp.recurrent_block.norm_4_bias", "h", when="layernorm"),
    )
    expert_states = (
        "mlp.recurrent_block.attention.linear_qkv",
        "mlp.recurrent_block.attention.core_attention",
        "mlp.recurrent_block.attention.linear_proj",
        "mlp.recurrent_block.mlp.linear_fc1",
        "mlp.recurrent_block.mlp.linear_fc2",
        "mlp.recurrent_block.norm_1",
        "mlp.recurrent_block.norm_2",
        "mlp.recurrent_block.norm_3",
        "mlp.recurrent_block.norm_4",
    )

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        """Yield what the system cannot do of what `config` asks for."""
        from more_megatron.blocks.refusals import expert_refusals, recurrence_refusals

        yield from recurrence_refusals(config)
        yield from expert_refusals(config, self.ffn_hidden_size(config))

    def health_ranges(self, config: MoREConfig) -> Mapping[str, Ends]:
        """Return the healthy ranges of its figures.

        The block attends over the whole sequence in each step, which makes states of tokens more alike than they are in
        experts, and they do not settle within a few steps.
        """
        return {"recurrence/token correlation": (None, 0.98), "recurrence/last step share": (0.05, None)}

    def stack(self, config: MoREConfig) -> Stack:
        """Return the layers of the whole model."""
        from more_megatron.blocks.block_moe import CombinedBlockMoELayer
        from more_megatron.blocks.layer import MicroBatchTransformerLayer
        from more_megatron.blocks.layers import decoder_stack, moe_layer
        from more_megatron.blocks.light_experts import LightExperts, light_experts_cost

        width = self.ffn_hidden_size(config)
        layer = moe_layer(
            config,
            layer=MicroBatchTransformerLayer,
            moe=functools.partial(CombinedBlockMoELayer, ffn_hidden_size=width),
            parts={"experts": LightExperts},
            experts_cost=functools.partial(light_experts_cost, config, width),
        )
        return decoder_stack(config, layer)


SYSTEM = CombinedBlock()
