"""Experts that are recurrent blocks of their own (Synthesis I, option A)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank

from more_megatron.config import MoREConfig
from more_megatron.costs import Cost
from more_megatron.experts.inputs import ExpertInputs
from more_megatron.experts.parameters import Placement
from more_megatron.experts.recurrent_block import RecurrentBlock, block_cost
from more_megatron.experts.replication import enter_replicated, leave_replicated

__all__ = ["RecurrentExperts", "expert_placement", "recurrent_experts_cost", "routed_context"]


def expert_placement(config: MoREConfig, num_local_experts: int, pg_collection: ProcessGroupCollection) -> Placement:
    """Return which experts' weights this rank holds, split over the expert-tensor-parallel group."""
    first = get_pg_rank(pg_collection.ep) * num_local_experts
    return Placement(
        groups=range(first, first + num_local_experts),
        num_groups=config.num_moe_experts,
        split_group=pg_collection.expt_tp,
        replica_rank=get_pg_rank(pg_collection.expt_dp),
    )


class RecurrentExperts(MegatronModule):
    """N independent recurrent blocks; the output of an expert is its last state.

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
        self.block = RecurrentBlock(
            config,
            expert_placement(config, num_local_experts, pg_collection),
            _ffn_hidden_size(config),
            name="expert",
        )

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
        ranks = self.block.placement.split_size
        x = enter_replicated(inputs.hidden_states, ranks)
        state = self.block(x, inputs.by_expert(), inputs.depth, inputs.noisy)
        return inputs.weigh(leave_replicated(state, ranks))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Return the weights of all experts as slices of one tensor each."""
        return self.block.sharded_state_dict(f"{prefix}block.", sharded_offsets, metadata)


def routed_context(config: MoREConfig, seq_length: int) -> float:
    """Return how many tokens of a sequence meet in one expert if the load is balanced."""
    return seq_length * config.moe_router_topk / config.num_moe_experts


def recurrent_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    expert = block_cost(config, _ffn_hidden_size(config), routed_context(config, seq_length))
    return expert.routed(config.num_moe_experts, config.moe_router_topk)


def _ffn_hidden_size(config: MoREConfig) -> int:
    return config.recurrence_ffn_hidden_size or 2 * config.hidden_size
