"""Linear maps with biases for rows of several experts, and the feed-forward network of two of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

from more_megatron.blocks.backends import RowGroups, backend_of
from more_megatron.blocks.cells import ExpertBias, gelu
from more_megatron.blocks.parameters import Placement, draw_parameter, grouped_bias, grouped_linear_weights
from more_megatron.blocks.replication import leave_replicated
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.initialization import BlockInitializer

__all__ = ["ExpertFeedForward", "ExpertLinear", "biased_linear_cost", "feed_forward_cost", "gather_columns"]

# Draws a weight: shape and name to values.
Draw = Callable[[tuple[int, ...], str], torch.Tensor]


class ExpertLinear(torch.nn.Module):
    """A linear map with bias for each expert on this rank.

    Args:
        shape: Shape of an expert's whole weight; the last dimension is the input, the others are the output.
        split_dim: Dimension that is split over ranks; None if every rank holds all of it. If it is the input, the
            outputs of the ranks are parts of a sum.
    """

    def __init__(
        self, config: MoREConfig, placement: Placement, shape: tuple[int, ...], split_dim: int | None = None
    ) -> None:
        super().__init__()
        self._placement, self._shape = placement, shape
        self._backend = backend_of(config)
        self._is_summed = split_dim == len(shape) - 1
        self.weight = grouped_linear_weights(config, placement, shape, split_dim)
        self.bias = grouped_bias(config, placement, shape[:-1], None if self._is_summed else split_dim)

    def draw(self, name: str, weight: Draw, bias: Draw) -> None:
        """Draw whole weights and biases of experts; the name of the map is unique within the layer."""
        draw_parameter(self.weight, self._placement, lambda group: weight(self._shape, f"{name}/{group}/weight"))
        draw_parameter(self.bias, self._placement, lambda group: bias(self._shape[:-1], f"{name}/{group}/bias"))

    def product(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return the products without the bias, [rows, out], given [rows, in]."""
        return self._backend.linear(rows, self.weight, groups)

    def row_bias(self, rows: torch.Tensor, groups: RowGroups) -> ExpertBias:
        """Return the bias for these rows, or this rank's part of it."""
        bias = leave_replicated(self.bias, self._placement.split_size) if self._is_summed else self.bias
        return ExpertBias.of(bias, groups, len(rows))

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return [rows, out] for [rows, in]."""
        return self.row_bias(rows, groups).add_to(self.product(rows, groups))


class ExpertFeedForward(torch.nn.Module):
    """A feed-forward network for each expert: linear, GELU, linear; `moe_ffn_hidden_size` is its width.

    Its inner layer is split over the ranks that split an expert; the outputs of the ranks are parts of a sum.
    """

    def __init__(self, config: MoREConfig, placement: Placement) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        self.fc1 = ExpertLinear(config, placement, (width, hidden), split_dim=0)
        self.fc2 = ExpertLinear(config, placement, (hidden, width), split_dim=1)

    def draw(self, initializer: BlockInitializer) -> None:
        """Draw the initial weights as Megatron draws those of an MLP; biases are zero."""
        self.fc1.draw("fc1", initializer.megatron_in, initializer.zeros)
        self.fc2.draw("fc2", initializer.megatron_out, initializer.zeros)

    def expand(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return this rank's part of the inner layer, [rows, width / ranks], given [rows, h]."""
        return gelu(self.fc1.product(rows, groups), self.fc1.row_bias(rows, groups))

    def contract(self, inner: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return this rank's part of the sum that is the output, [rows, h], given its part of the inner layer."""
        return self.fc2(inner, groups)

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return this rank's part of the sum that is the output, [rows, h], given [rows, h]."""
        return self.contract(self.expand(rows, groups), groups)


def gather_columns(x: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the columns of all ranks that split an expert, [rows, n], given those of this rank, [rows, n / ranks]."""
    if placement.split_size == 1:
        return x
    gathered: torch.Tensor = all_gather_last_dim_from_tensor_parallel_region(x, group=placement.split_group)
    return gathered


def biased_linear_cost(*shape: int) -> Cost:
    """Return the cost of a linear map with bias, given the shape of its weight."""
    biases = math.prod(shape[:-1])
    return linear_cost(shape[-1], biases) + Cost(biases, biases)


def feed_forward_cost(config: Any) -> Cost:
    """Return the cost of `ExpertFeedForward` for one expert."""
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size
    return biased_linear_cost(width, hidden) + biased_linear_cost(hidden, width)
