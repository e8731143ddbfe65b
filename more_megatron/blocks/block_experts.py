"""Experts that are recurrent blocks of their own (Synthesis I, option A)."""

from __future__ import annotations

from typing import Any

import torch

from more_megatron.blocks.experts import Experts
from more_megatron.blocks.recurrent_block import RecurrentBlock, block_cost
from more_megatron.blocks.replication import enter_replicated, leave_replicated
from more_megatron.blocks.rows import Rows
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth

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

    def initialize(self, layer_number: int) -> None:
        """Learn the number of the layer and draw the initial weights."""
        self.block.initialize(layer_number)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Compute all local experts on the rows that were sent to them.

        Args:
            hidden_states: [rows, h].
            rows: Which rows they are.
            depth: Recurrence steps.

        Returns:
            Last states, [rows, h]; with several expert-tensor-parallel ranks this rank's part of a sum that gives them.
        """
        ranks = self.placement.split_size
        rows, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(enter_replicated(hidden_states, ranks))
        return leave_replicated(padding.unpad(self.block(x, rows, depth)), ranks)


def routed_context(config: MoREConfig, seq_length: int) -> float:
    """Return how many tokens of a sequence meet in one expert if the load is balanced."""
    return seq_length * config.moe_router_topk / config.num_moe_experts


def block_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    expert = block_cost(config, ffn_hidden_size, routed_context(config, seq_length))
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
