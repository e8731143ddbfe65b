"""Synthesis I, option A: expert i is its own recurrent block.

s <- Block_i(Adapter_i([s; x])), r times, from a random state; the output is the last state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from more_megatron.blocks.refusals import expert_refusals, mixing_refusals, recurrence_refusals
from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import block_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack


class RecurrentExperts(System):
    """Experts that are recurrent blocks; the tokens sent to one attend to each other within their sequence."""

    name = "recurrent_experts"
    summary = "each expert is its own recurrent block: `s <- Block_i(Adapter_i([s; x]))`, r times"
    reads = DEPTH | {"recurrence_state_std", "recurrence_ffn_hidden_size"}
    block_width = 2
    mixes_tokens = True
    expert_rows = block_rows("mlp.experts.block", "mlp.experts", "N")

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        yield from recurrence_refusals(config)
        yield from expert_refusals(config, self.ffn_hidden_size(config))
        yield from mixing_refusals(config)

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.block_experts import BlockExperts, block_experts_cost
        from more_megatron.blocks.dispatch import RowMoELayer
        from more_megatron.blocks.layers import expert_stack

        width = self.ffn_hidden_size(config)
        experts = functools.partial(BlockExperts, ffn_hidden_size=width)
        return expert_stack(config, RowMoELayer, experts, functools.partial(block_experts_cost, config, width))


SYSTEM = RecurrentExperts()
