"""What kinds of experts have in common: how they are called, linear maps with biases, a feed-forward network."""

import dataclasses
import math
from abc import abstractmethod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from more_megatron.blocks.cells import ExpertBias
from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.rows import RowGroups, RowPadding
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer, Draw


class Experts(GroupedModule):
    """All experts of a layer that are on this rank. Takes the arguments of Megatron's experts.

    The weights of an expert are split over the expert-tensor-parallel group.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: MoREConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        first = get_pg_rank(pg_collection.ep) * num_local_experts
        placement = Placement(
            groups=range(first, first + num_local_experts),
            num_groups=config.num_moe_experts,
            split_group=pg_collection.expt_tp,
            replica_rank=get_pg_rank(pg_collection.expt_dp),
        )
        super().__init__(config, placement)
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Create the weights."""


class RoutedExperts(Experts):
    """Experts that are called as Megatron's are: each row by itself."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        probs: torch.Tensor,
        depth: Depth | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return the weighed outputs of all local experts, [rows, h], and no bias.

        Args:
            hidden_states: Rows grouped by expert, [rows, h].
            tokens_per_expert: Number of rows of each local expert, [local experts].
            probs: Routing weight of each row, [rows].
            depth: Steps to take, for experts that iterate.
        """
        groups = RowGroups.of_counts(torch.as_tensor(tokens_per_expert), hidden_states.device)
        padding = RowPadding.of(groups, self.backend.row_multiple(self.config))
        return self.compute(padding.pad(hidden_states), padding, probs, depth), None

    @abstractmethod
    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor, depth: Depth | None) -> torch.Tensor:
        """Return the weighed outputs, [rows, h], given the rows with padding, and the weights without."""


class ExpertLinear(GroupedModule):
    """A linear map with bias for each expert on this rank.

    If its input is split over ranks, the outputs of the ranks are parts of a sum.
    """

    def __init__(self, config: MoREConfig, placement: Placement, weight: Weight, bias: Draw) -> None:
        super().__init__(config, placement)
        self._is_summed = weight.split_dim == len(weight.shape) - 1
        split_dim = None if self._is_summed else weight.split_dim
        self.weight = self.linear_weights(dataclasses.replace(weight, name=f"{weight.name}/{{}}/weight"))
        self.bias = self.stacked_bias(Weight(weight.shape[:-1], f"{weight.name}/{{}}/bias", bias, split_dim))

    def product(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return the products without the bias, [rows, out], given [rows, in]."""
        return self.backend.linear(rows, self.weight, groups)

    def row_bias(self, rows: torch.Tensor, groups: RowGroups) -> ExpertBias:
        """Return the bias for these rows, or this rank's part of it."""
        bias = self.placement.leave(self.bias) if self._is_summed else self.bias
        return ExpertBias.of(bias, groups, len(rows))

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return [rows, out] for [rows, in]."""
        return self.row_bias(rows, groups).add_to(self.product(rows, groups))


class ExpertFeedForward(GroupedModule):
    """A feed-forward network for each expert: linear, GELU, linear; `moe_ffn_hidden_size` is its width.

    Its inner layer is split over the ranks that split an expert; the outputs of the ranks are parts of a sum. Weights
    are drawn as Megatron draws those of an MLP.
    """

    def __init__(self, config: MoREConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        hidden, width, draws = config.hidden_size, config.moe_ffn_hidden_size, BlockInitializer
        self.fc1 = ExpertLinear(
            config, placement, Weight((width, hidden), "fc1", draws.megatron_in, split_dim=0), draws.zeros
        )
        self.fc2 = ExpertLinear(
            config, placement, Weight((hidden, width), "fc2", draws.megatron_out, split_dim=1), draws.zeros
        )

    def expand(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return this rank's part of the inner layer, [rows, width / ranks], given [rows, h]."""
        return torch.nn.functional.gelu(self.fc1(rows, groups))

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return this rank's part of the sum that is the output, [rows, h], given [rows, h]."""
        return self.fc2(self.expand(rows, groups), groups)


def biased_linear_cost(*shape: int) -> Cost:
    """Return the cost of a linear map with bias, given the shape of its weight."""
    biases = math.prod(shape[:-1])
    return linear_cost(shape[-1], biases) + Cost(biases, biases)


def feed_forward_cost(config: Any) -> Cost:
    """Return the cost of `ExpertFeedForward` for one expert."""
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size
    return biased_linear_cost(width, hidden) + biased_linear_cost(hidden, width)
