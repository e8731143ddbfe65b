"""Light experts: one hidden layer of twice the hidden size, no gate."""

from __future__ import annotations

import math

import torch

from more_megatron.blocks.backends import RowGroups
from more_megatron.blocks.experts import Experts
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.parameters import draw_parameter, grouped_linear_weights
from more_megatron.blocks.recurrent_block import block_cost
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.initialization import BlockInitializer

__all__ = ["LightExperts", "light_experts_cost"]


class LightExperts(Experts):
    """Expert i computes `W2_i . GELU(W1_i . x)` with dropout on the result; h -> 2h -> h."""

    def build(self) -> None:
        """Create the weights."""
        hidden = self.config.hidden_size
        self.fc1 = grouped_linear_weights(self.config, self.placement, (2 * hidden, hidden), split_dim=0)
        self.fc2 = grouped_linear_weights(self.config, self.placement, (hidden, 2 * hidden), split_dim=1)
        self.dropout = torch.nn.Dropout(self.config.hidden_dropout)

    def initialize(self, layer_number: int) -> None:
        """Draw the initial weights, which depend on the number of the layer."""
        if not self.config.perform_initialization:
            return
        initializer, hidden = BlockInitializer(self.config, layer_number), self.config.hidden_size
        # What they compute is the input of a block, not added to the stream: nothing is to keep it small.
        out_std = initializer.in_std / _routed_length(self.config)
        for parameter, shape, std, name in (
            (self.fc1, (2 * hidden, hidden), initializer.in_std, "fc1"),
            (self.fc2, (hidden, 2 * hidden), out_std, "fc2"),
        ):

            def draw(group: int, shape: tuple = shape, std: float = std, name: str = name) -> torch.Tensor:
                return initializer.truncated_normal(shape, f"light/{group}/{name}", std)

            draw_parameter(parameter, self.placement, draw)

    def forward(
        self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Compute all local experts.

        Args:
            hidden_states: Rows grouped by expert, [rows, h].
            tokens_per_expert: Number of rows of each local expert, [local experts].
            probs: Routing probability of each row, [rows].

        Returns:
            Outputs times probabilities, [rows, h], and no bias.
        """
        groups = RowGroups.of_counts(torch.as_tensor(tokens_per_expert), hidden_states.device)
        padding = RowPadding.of(groups, self.backend.row_multiple(self.config))
        inner = self.backend.linear(padding.pad(hidden_states), self.fc1, padding.groups)
        outer = self.backend.linear(torch.nn.functional.gelu(inner), self.fc2, padding.groups)
        output = self.dropout(padding.unpad(outer))
        return (output * probs.unsqueeze(-1)).to(output.dtype), None


def _routed_length(config: MoREConfig) -> float:
    """Return how long the sum of the chosen experts' outputs is, each of length 1, if routers know nothing yet."""
    chosen = config.moe_router_topk
    is_share_of_all = config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax
    return math.sqrt(chosen) / (config.num_moe_experts if is_share_of_all else chosen)


def light_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block that follows them."""
    hidden = config.hidden_size
    expert = linear_cost(hidden, 2 * hidden) + linear_cost(2 * hidden, hidden)
    routed = expert.routed(config.num_moe_experts, config.moe_router_topk)
    return routed + block_cost(config, ffn_hidden_size, seq_length)
