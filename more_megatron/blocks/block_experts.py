"""Experts that are recurrent blocks of their own (Synthesis I, option A)."""

from __future__ import annotations

from typing import Any

import torch

from more_megatron.blocks.expert_inputs import ExpertInputs
from more_megatron.blocks.experts import Experts
from more_megatron.blocks.recurrent_block import RecurrentBlock, block_cost
from more_megatron.blocks.replication import enter_replicated, leave_replicated
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost

__all__ = ["BlockExperts", "block_experts_cost", "routed_context"]


class BlockExperts(Experts):
    """N independent recurrent blocks; the output of an expert is its last state.

    Args:
        args: As for `Experts`.
        ffn_hidden_size: Width of the MLP in a block.
        kwargs: As for `Experts`.
    """

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        self._ffn_hidden_size = ffn_hidden_size
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Create the weights."""
        self.block = RecurrentBlock(self.config, self.placement, self._ffn_hidden_size, name="expert")

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer and draw the initial weights."""
        self.block.set_layer_number(layer_number)

    def forward(self, inputs: ExpertInputs) -> torch.Tensor:
        """Compute all local experts on the rows that were sent to them.

        Args:
            inputs: Rows, sorted.

        Returns:
            Last states times routing probabilities, [rows, h].
        """
        ranks = self.placement.split_size
        rows, padding = inputs.by_expert().padded(self.backend.row_multiple(self.config))
        x = padding.pad(enter_replicated(inputs.hidden_states, ranks))
        state = padding.unpad(self.block(x, rows, inputs.depth, inputs.noisy))
        return inputs.weigh(leave_replicated(state, ranks))


def routed_context(config: MoREConfig, seq_length: int) -> float:
    """Return how many tokens of a sequence meet in one expert if the load is balanced."""
    return seq_length * config.moe_router_topk / config.num_moe_experts


def block_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    expert = block_cost(config, ffn_hidden_size, routed_context(config, seq_length))
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
