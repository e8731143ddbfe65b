"""Experts that are projections around a recurrent block all of them share (Synthesis I, option B)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from more_megatron.blocks.block_experts import routed_context
from more_megatron.blocks.experts import Experts
from more_megatron.blocks.parameters import draw_parameter, grouped_linear_weights
from more_megatron.blocks.recurrent_block import RecurrentBlock, block_cost
from more_megatron.blocks.replication import enter_replicated, leave_replicated
from more_megatron.blocks.rows import Rows
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.monitoring.watch import Key, Watch

__all__ = ["ProjectionExperts", "projection_experts_cost"]


class ProjectionExperts(Experts):
    """Expert i computes `W_out_i . R(W_in_i . x)`. The projections start orthogonal.

    Args:
        args: As for `Experts`.
        dropout: Probability of dropout on the output of the projections.
        kwargs: As for `Experts`.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        self._dropout_probability = dropout
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        """Create the weights."""
        shape = (self.config.hidden_size, self.config.hidden_size)
        self.proj_in = grouped_linear_weights(self.config, self.placement, shape)
        self.proj_out = grouped_linear_weights(self.config, self.placement, shape)
        self.dropout = torch.nn.Dropout(self._dropout_probability)

    def initialize(self, layer_number: int) -> None:
        """Draw the initial weights, which depend on the number of the layer."""
        if not self.config.perform_initialization:
            return
        initializer = BlockInitializer(self.config, layer_number)
        shape = (self.config.hidden_size, self.config.hidden_size)
        for name in ("proj_in", "proj_out"):

            def draw(group: int, name: str = name) -> torch.Tensor:
                return initializer.orthogonal(shape, f"{name}/{group}")

            draw_parameter(getattr(self, name), self.placement, draw)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth, block: RecurrentBlock) -> torch.Tensor:
        """Compute all local experts on the rows that were sent to them.

        Args:
            hidden_states: [rows, h].
            rows: Which rows they are.
            depth: Recurrence steps.
            block: The shared block.

        Returns:
            Projected last states, [rows, h]; with several expert-tensor-parallel ranks this rank's part of a sum that
            gives them.
        """
        ranks = self.placement.split_size
        rows, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(enter_replicated(hidden_states, ranks))
        projected = self.dropout(self.backend.linear(x, self.proj_in, rows.groups))
        state = block(projected, rows.as_one_group(), depth)
        output = self.dropout(padding.unpad(self.backend.linear(state, self.proj_out, rows.groups)))
        return leave_replicated(output, ranks)

    def orthogonality_penalty(self) -> torch.Tensor:
        """Return the mean over local projections of `||W W^T - 1||^2 / h`, in float32."""
        weights = torch.cat([self.backend.stacked(part) for part in (self.proj_in, self.proj_out)]).float()
        identity = torch.eye(weights.size(1), device=weights.device)
        deviation = weights @ weights.transpose(1, 2) - identity
        return deviation.square().sum(dim=(1, 2)).mean() / weights.size(1)

    @torch.no_grad()
    def record_projections(self, watch: Watch, place: str, share: float) -> None:
        """Record how far projections are from orthogonal, and from those of other experts. All expert ranks call it.

        The divergence of two is one minus the cosine of the angle between them; its mean over all pairs follows from
        the sum of the weights at unit length.

        Args:
            watch: Where to.
            place: Layer of the experts.
            share: One part in as many as there are ranks that hold the same experts.
        """
        watch.add_mean(Key("system", "projection orthogonality", place), self.orthogonality_penalty(), share=share)
        number, group = self.placement.num_groups, parallel_state.get_expert_model_parallel_group()
        for name in ("proj_in", "proj_out"):
            weights = self.backend.stacked(getattr(self, name)).detach().float().flatten(1)
            total = torch.nn.functional.normalize(weights, dim=1).sum(0)
            torch.distributed.all_reduce(total, group=group)
            divergence = 1.0 - (total.double().square().sum() - number) / max(number * (number - 1), 1)
            watch.add_mean(Key("system", f"{name} divergence", place), divergence, share=share)


def projection_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block between their projections."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    block = block_cost(config, ffn_hidden_size, routed_context(config, seq_length))
    rows = block.routed(1, topk)
    # A token meets the one block however many experts it is sent to.
    shared = Cost(block.parameters, block.parameters, rows.once, rows.per_step)
    return (linear_cost(config.hidden_size, config.hidden_size) * 2).routed(experts, topk) + shared
