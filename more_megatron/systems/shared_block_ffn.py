"""Synthesis I, option B as in the implementation summary.

Light experts (h -> 2h, GELU, 2h -> h, dropout) are combined; then one recurrent block runs over the whole sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from more_megatron.blocks.refusals import expert_refusals, recurrence_refusals
from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends


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
        *(
            Row(f"{norm}.{kind}", f"{norm}{suffix}", "h", when=when)
            for norm in (f"mlp.recurrent_block.norm_{number}" for number in range(1, 5))
            for kind, suffix, when in (("weight", "", ""), ("bias", "_bias", "layernorm"))
        ),
    )

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        yield from recurrence_refusals(config)
        yield from expert_refusals(config, self.ffn_hidden_size(config))

    def health_ranges(self, config: MoREConfig) -> Mapping[str, Ends]:
        """Return the healthy ranges of its figures.

        The block attends over the whole sequence in each step, which makes states of tokens more alike than they are in
        experts, and they do not settle within a few steps.
        """
        return {"recurrence/token correlation": (None, 0.98), "recurrence/last step share": (0.05, None)}

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.block_experts import CombinedBlockMoELayer, LightExperts, light_experts_cost
        from more_megatron.blocks.layers import expert_stack

        width = self.ffn_hidden_size(config)
        moe = functools.partial(CombinedBlockMoELayer, ffn_hidden_size=width)
        return expert_stack(config, moe, LightExperts, functools.partial(light_experts_cost, config, width))


SYSTEM = CombinedBlock()
