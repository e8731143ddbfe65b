"""Megatron's own experts: gated feed-forward networks."""

from __future__ import annotations

from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, gated_mlp_cost, linear_cost

__all__ = ["ffn_experts_cost"]


def ffn_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size
    expert = gated_mlp_cost(hidden, width)
    if not config.gated_linear_unit:
        expert = linear_cost(hidden, width) + linear_cost(width, hidden)
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
