"""Experts that are projections around a recurrent block all of them share (Synthesis I, option B)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from more_megatron.backends import grouped_linear
from more_megatron.config import MoREConfig
from more_megatron.costs import Cost, linear_cost
from more_megatron.experts.inputs import ExpertInputs
from more_megatron.experts.parameters import draw_parameter, grouped_parameter, sharded_parameters
from more_megatron.experts.recurrent import expert_placement, routed_context
from more_megatron.experts.recurrent_block import RecurrentBlock, block_cost
from more_megatron.experts.replication import enter_replicated, leave_replicated
from more_megatron.recurrence.initialization import BlockInitializer

__all__ = ["ProjectionExperts", "projection_experts_cost", "shared_ffn_hidden_size"]


class ProjectionExperts(MegatronModule):
    """Expert i computes `W_out_i . R(W_in_i . x)`. The projections start orthogonal.

    Args:
        num_local_experts: Number of experts on this rank.
        config: Model configuration.
        pg_collection: Process groups.
        name: Name of the module, unused.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: MoREConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.placement = expert_placement(config, num_local_experts, pg_collection)
        shape = (config.hidden_size, config.hidden_size)
        self.proj_in = grouped_parameter(config, self.placement, shape)
        self.proj_out = grouped_parameter(config, self.placement, shape)
        self.dropout = torch.nn.Dropout(config.projection_dropout)

    def set_layer_number(self, layer_number: int) -> None:
        """Draw the initial weights, which depend on the number of the layer."""
        if not self.config.perform_initialization:
            return
        initializer = BlockInitializer(self.config, layer_number)
        shape = (self.config.hidden_size, self.config.hidden_size)
        for name, parameter in self.named_parameters():

            def draw(group: int, name: str = name) -> torch.Tensor:
                return initializer.orthogonal(shape, f"{name}/{group}")

            draw_parameter(parameter, self.placement, draw)

    def forward(self, inputs: ExpertInputs, block: RecurrentBlock) -> torch.Tensor:
        """Compute all local experts on the rows that were sent to them.

        Args:
            inputs: Rows, sorted.
            block: The shared block.

        Returns:
            Projected last states times routing probabilities, [rows, h].
        """
        ranks = self.placement.split_size
        ends = inputs.rows.expert_ends
        x = enter_replicated(inputs.hidden_states, ranks)
        projected = self.dropout(grouped_linear(x, self.proj_in, ends))
        state = block(projected, inputs.as_one_group(), inputs.depth, inputs.noisy)
        output = self.dropout(grouped_linear(state, self.proj_out, ends))
        return inputs.weigh(leave_replicated(output, ranks))

    def orthogonality_penalty(self) -> torch.Tensor:
        """Return the mean over local projections of `||W W^T - 1||^2 / h`, in float32."""
        weights = torch.cat((self.proj_in, self.proj_out)).float()
        identity = torch.eye(weights.size(1), device=weights.device)
        deviation = weights @ weights.transpose(1, 2) - identity
        return deviation.square().sum(dim=(1, 2)).mean() / weights.size(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Return the projections of all experts as slices of one tensor each."""
        return sharded_parameters(self, self.placement, prefix, sharded_offsets, metadata)


def shared_ffn_hidden_size(config: MoREConfig) -> int:
    """Return the width of the MLP in a block that experts share."""
    return config.recurrence_ffn_hidden_size or 4 * config.hidden_size


def projection_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block between their projections."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    block = block_cost(config, shared_ffn_hidden_size(config), routed_context(config, seq_length))
    rows = block.routed(1, topk)
    # A token meets the one block however many experts it is sent to.
    shared = Cost(block.parameters, block.parameters, rows.once, rows.per_step)
    return (linear_cost(config.hidden_size, config.hidden_size) * 2).routed(experts, topk) + shared
