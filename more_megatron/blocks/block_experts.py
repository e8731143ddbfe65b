"""Experts around recurrent blocks (Synthesis I).

Each is its own (option A), or is projections around one that all share (option B), or a light network in front of one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state

from more_megatron.blocks.experts import Experts, RoutedExperts
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.parameters import draw_parameters, grouped_linear_weights
from more_megatron.blocks.recurrent_block import RecurrentBlock, block_cost
from more_megatron.blocks.replication import enter_replicated, leave_replicated
from more_megatron.blocks.rows import Rows
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.monitoring.watch import Key, Watch

__all__ = [
    "BlockExperts",
    "LightExperts",
    "ProjectionExperts",
    "block_experts_cost",
    "light_experts_cost",
    "projection_experts_cost",
]


class BlockExperts(Experts):
    """N independent recurrent blocks with MLPs of that width; the output of an expert is its last state."""

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        self._ffn_hidden_size = ffn_hidden_size
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        self.block = RecurrentBlock(self.config, self.placement, self._ffn_hidden_size, name="expert")

    def initialize(self, layer_number: int) -> None:
        self.block.initialize(layer_number)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Return the last states, [rows, h], given the rows that were sent to the local experts.

        With several expert-tensor-parallel ranks it is this rank's part of a sum that gives them.
        """
        ranks = self.placement.split_size
        rows, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(enter_replicated(hidden_states, ranks))
        return leave_replicated(padding.unpad(self.block(x, rows, depth)), ranks)


class ProjectionExperts(Experts):
    """Expert i computes `W_out_i . R(W_in_i . x)`, with dropout on both projections. They start orthogonal."""

    def build(self) -> None:
        config: Any = self.config
        shape = (config.hidden_size, config.hidden_size)
        self.proj_in = grouped_linear_weights(config, self.placement, shape)
        self.proj_out = grouped_linear_weights(config, self.placement, shape)
        self.dropout = torch.nn.Dropout(config.projection_dropout)

    def draw(self, initializer: BlockInitializer) -> None:
        def draw(name: str, shape: tuple[int, ...], group: int) -> torch.Tensor:
            return initializer.orthogonal(shape, f"{name}/{group}")

        shape = (self.config.hidden_size, self.config.hidden_size)
        draw_parameters(self, dict.fromkeys(("proj_in", "proj_out"), shape), self.placement, draw)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth, block: RecurrentBlock) -> torch.Tensor:
        """Return the projected last states of the shared block, otherwise as `BlockExperts.forward`."""
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
        the sum of the weights at unit length. `share` is 1 over the number of ranks with the same experts.
        """
        watch.add_mean(Key("system", "projection orthogonality", place), self.orthogonality_penalty(), share=share)
        number, group = self.placement.num_groups, parallel_state.get_expert_model_parallel_group()
        for name in ("proj_in", "proj_out"):
            weights = self.backend.stacked(getattr(self, name)).detach().float().flatten(1)
            total = torch.nn.functional.normalize(weights, dim=1).sum(0)
            torch.distributed.all_reduce(total, group=group)
            divergence = 1.0 - (total.double().square().sum() - number) / max(number * (number - 1), 1)
            watch.add_mean(Key("system", f"{name} divergence", place), divergence, share=share)


class LightExperts(RoutedExperts):
    """Expert i computes `W2_i . GELU(W1_i . x)` with dropout on the result; h -> 2h -> h."""

    def build(self) -> None:
        hidden = self.config.hidden_size
        self._shapes = {"fc1": (2 * hidden, hidden), "fc2": (hidden, 2 * hidden)}
        self.fc1 = grouped_linear_weights(self.config, self.placement, self._shapes["fc1"], split_dim=0)
        self.fc2 = grouped_linear_weights(self.config, self.placement, self._shapes["fc2"], split_dim=1)
        self.dropout = torch.nn.Dropout(self.config.hidden_dropout)

    def draw(self, initializer: BlockInitializer) -> None:
        # What they compute is the input of a block, not added to the stream: nothing is to keep it small.
        stds = {"fc1": initializer.in_std, "fc2": initializer.in_std / _routed_length(self.config)}

        def draw(name: str, shape: tuple[int, ...], group: int) -> torch.Tensor:
            return initializer.truncated_normal(shape, f"light/{group}/{name}", stds[name])

        draw_parameters(self, self._shapes, self.placement, draw)

    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor) -> torch.Tensor:
        inner = self.backend.linear(x, self.fc1, padding.groups)
        outer = self.backend.linear(torch.nn.functional.gelu(inner), self.fc2, padding.groups)
        output = self.dropout(padding.unpad(outer))
        return (output * probs.unsqueeze(-1)).to(output.dtype)


def _routed_length(config: MoREConfig) -> float:
    """Return how long the sum of the chosen experts' outputs is, each of length 1, if routers know nothing yet."""
    chosen = config.moe_router_topk
    is_share_of_all = config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax
    return math.sqrt(chosen) / (config.num_moe_experts if is_share_of_all else chosen)


def _routed_context(config: MoREConfig, seq_length: int) -> float:
    """Return how many tokens of a sequence meet in one expert if the load is balanced."""
    return seq_length * config.moe_router_topk / config.num_moe_experts


def block_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    expert = block_cost(config, ffn_hidden_size, _routed_context(config, seq_length))
    return expert.routed(config.num_moe_experts, config.moe_router_topk)


def projection_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block between their projections."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    block = block_cost(config, ffn_hidden_size, _routed_context(config, seq_length))
    rows = block.routed(1, topk)
    # A token meets the one block however many experts it is sent to.
    shared = Cost(block.parameters, block.parameters, rows.once, rows.per_step)
    return (linear_cost(config.hidden_size, config.hidden_size) * 2).routed(experts, topk) + shared


def light_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block that follows them."""
    hidden = config.hidden_size
    expert = linear_cost(hidden, 2 * hidden) + linear_cost(2 * hidden, hidden)
    routed = expert.routed(config.num_moe_experts, config.moe_router_topk)
    return routed + block_cost(config, ffn_hidden_size, seq_length)
