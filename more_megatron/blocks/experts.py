"""What kinds of experts have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank

from more_megatron.blocks.backends import RowGroups, backend_of
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.parameters import Placement, sharded_parameters
from more_megatron.config import MoREConfig
from more_megatron.model.initialization import BlockInitializer

__all__ = ["Experts", "RoutedExperts"]


class Experts(MegatronModule):
    """All experts of a layer that are on this rank. Takes the arguments of Megatron's experts.

    The weights of an expert are split over the expert-tensor-parallel group.
    """

    config: MoREConfig
    layer_number = 0

    def __init__(
        self,
        num_local_experts: int,
        config: MoREConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        first = get_pg_rank(pg_collection.ep) * num_local_experts
        self.placement = Placement(
            groups=range(first, first + num_local_experts),
            num_groups=config.num_moe_experts,
            split_group=pg_collection.expt_tp,
            replica_rank=get_pg_rank(pg_collection.expt_dp),
        )
        self.backend = backend_of(config)
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Create the weights."""

    def initialize(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the initial weights, which depend on it."""
        self.layer_number = layer_number
        if self.config.perform_initialization:
            self.draw(BlockInitializer(self.config, layer_number))

    @abstractmethod
    def draw(self, initializer: BlockInitializer) -> None:
        """Draw the initial weights."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Return the weights of all experts as slices of one tensor each."""
        return sharded_parameters(self, self.placement, prefix, sharded_offsets, metadata)


class RoutedExperts(Experts):
    """Experts that are called as Megatron's are: each row by itself."""

    def forward(
        self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Return the weighed outputs of all local experts, [rows, h], and no bias.

        Args:
            hidden_states: Rows grouped by expert, [rows, h].
            tokens_per_expert: Number of rows of each local expert, [local experts].
            probs: Routing weight of each row, [rows].
        """
        groups = RowGroups.of_counts(torch.as_tensor(tokens_per_expert), hidden_states.device)
        padding = RowPadding.of(groups, self.backend.row_multiple(self.config))
        return self.compute(padding.pad(hidden_states), padding, probs), None

    @abstractmethod
    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor) -> torch.Tensor:
        """Return the weighed outputs, [rows, h], given the rows with padding, and the weights without."""
