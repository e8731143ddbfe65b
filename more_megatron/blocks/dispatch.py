"""The MoE layer of experts that mix tokens, and dispatchers that tell them where each token stands.

Such an expert must know which of the rows that reached it belong together, and in which order: the sequence, the
position and the sample of each. These integers take the way of the tokens: the same permutation, the same all-to-all or
all-gather. `dispatch_coordinates` takes those of the tokens on this rank, int64 [tokens, 3], and returns those of the
rows that the local experts received, int64 [rows, 3]. It is called after `dispatch_postprocess` of the same forward
pass.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from more_megatron.blocks.layer import LayerInputs, MicroBatchMoELayer
from more_megatron.blocks.rows import Rows
from more_megatron.model.depth import Depth
from more_megatron.model.noise import TokenGrid


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


class RowMoELayer(MicroBatchMoELayer):
    """Megatron's MoE layer for experts that mix tokens: they receive coordinates along with the rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The one that Megatron has built and told of shared experts.
        self.token_dispatcher.__class__ = DISPATCHERS[self.config.moe_token_dispatcher_type]
        # Data-parallel replicas whose tokens meet on one expert rank.
        ranks_of_experts = self.token_dispatcher.tp_size * self.token_dispatcher.ep_size
        self._replicas = ranks_of_experts // self.attn_tp_group.size()

    def compute_experts(self, hidden_states: torch.Tensor, inputs: LayerInputs, *rows: torch.Tensor) -> torch.Tensor:
        dispatched, tokens_per_expert, probs = rows
        sorted_rows, order = self._sort(hidden_states, tokens_per_expert, inputs)
        return self._compute_sorted(dispatched, probs, sorted_rows, order, inputs.micro_batch.depth)

    def _compute_sorted(
        self, dispatched: torch.Tensor, probs: torch.Tensor, rows: Rows, order: torch.Tensor, depth: Depth
    ) -> torch.Tensor:
        """Return the weighed output of the experts for the dispatched rows, [rows, h], in the dispatcher's order."""
        output = self._apply_experts(dispatched.index_select(0, order), rows, depth)
        output = (output * probs.index_select(0, order).unsqueeze(-1)).to(output.dtype)
        return torch.empty_like(output).index_copy(0, order, output)

    def _apply_experts(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Return the output of the local experts, [rows, h], given the sorted rows."""
        return self.experts(hidden_states, rows, depth)

    def _sort(
        self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, inputs: LayerInputs
    ) -> tuple[Rows, torch.Tensor]:
        (length, batch), config = hidden_states.shape[:2], self.config
        replica = parallel_state.get_data_parallel_rank() % self._replicas
        grid = TokenGrid.of(
            hidden_states, inputs.micro_batch, config, self.attn_tp_group, first_sequence=replica * batch
        )
        return Rows.sort(
            self.token_dispatcher.dispatch_coordinates(grid.coordinates),
            tokens_per_expert,
            num_sequences=self._replicas * batch * inputs.micro_batch.parts,
            seq_length=length * self.attn_tp_group.size() if config.sequence_parallel else length,
            rotary_pos_emb=inputs.rotary_pos_emb,
        )
