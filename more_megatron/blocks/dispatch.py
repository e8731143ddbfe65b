"""Dispatchers that tell the experts where each token stands: its sequence, its position and its sample.

An expert that mixes tokens must know which of the rows that reached it belong together, and in which order. These
integers take the way of the tokens: the same permutation, the same all-to-all or all-gather.

`dispatch_coordinates` takes those of the tokens on this rank, int64 [tokens, 3], and returns those of the rows that the
local experts received, int64 [rows, 3]. It is called after `dispatch_postprocess` of the same forward pass.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

__all__ = ["DISPATCHERS", "CoordinateAllGatherDispatcher", "CoordinateAlltoAllDispatcher"]


class CoordinateAllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Megatron's all-gather dispatcher, with coordinates."""

    @torch.no_grad()
    def dispatch_coordinates(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Send coordinates where the tokens went."""
        if self.tp_size > 1 or self.ep_size > 1:
            coordinates = gather_from_sequence_parallel_region(coordinates, group=self.tp_ep_group)
        return permute(coordinates, self.local_map, num_out_tokens=int(self.local_map.sum()))[0]


class CoordinateAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, with coordinates."""

    @torch.no_grad()
    def dispatch_coordinates(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Send coordinates where the tokens went."""
        rows = permute(coordinates, self.routing_map, num_out_tokens=self.num_out_tokens)[0]
        rows = all_to_all(self.ep_group, rows, self.output_splits, self.input_splits)
        if self.tp_size > 1:
            splits = None if self.output_splits_tp is None else self.output_splits_tp.tolist()
            rows = gather_from_sequence_parallel_region(rows, group=self.tp_group, output_split_sizes=splits)
        if self.num_local_experts > 1:
            chunks = self.num_global_tokens_per_local_expert.ravel()
            rows = sort_chunks_by_idxs(rows, chunks, self.sort_input_by_local_experts)[0]
        return rows


DISPATCHERS: dict[str, type[CoordinateAllGatherDispatcher] | type[CoordinateAlltoAllDispatcher]] = {
    "allgather": CoordinateAllGatherDispatcher,
    "alltoall": CoordinateAlltoAllDispatcher,
}
