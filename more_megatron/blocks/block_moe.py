"""MoE layers whose experts share one recurrent block (Synthesis I, option B, in two readings)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.blocks.base_moe import BaseMoELayer
from more_megatron.blocks.layer import LayerInputs, RowMoELayer
from more_megatron.blocks.parameters import Placement
from more_megatron.blocks.recurrent_block import RecurrentBlock, SequenceBlock
from more_megatron.blocks.rows import Rows
from more_megatron.blocks.statistics import record_loss
from more_megatron.model.depth import Depth
from more_megatron.model.loops import TokenGrid

__all__ = ["CombinedBlockMoELayer", "SharedBlockMoELayer"]


class SharedBlockMoELayer(RowMoELayer):
    """Per-expert projections around one recurrent block, which is a dense parameter of the layer.

    Every expert rank holds the block and computes it on the rows of its experts. Where experts are split over the
    tensor-parallel ranks, so is the block. `ffn_hidden_size` is the width of the MLP in it.
    """

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, groups = self.config, kwargs["pg_collection"]
        split_experts = get_pg_size(groups.expt_tp) > 1
        placement = Placement(
            groups=range(1),
            num_groups=1,
            split_group=groups.expt_tp if split_experts else None,
            replica_rank=get_pg_rank(groups.dp_cp if split_experts else groups.tp_dp_cp),
        )
        self.recurrent_block = RecurrentBlock(config, placement, ffn_hidden_size, name="shared")
        # Replicas of experts see other rows on each tensor-parallel rank: their gradients are summed, as under
        # sequence parallelism.
        for parameter in self.recurrent_block.parameters():
            parameter.sequence_parallel = config.sequence_parallel and not split_experts
        # Megatron averages the gradients of experts over fewer replicas than those of dense parameters.
        self._replica_ratio = get_pg_size(groups.dp_cp) / get_pg_size(groups.expt_dp)

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1; experts and block draw their weights."""
        super().set_layer_number(layer_number)
        self.recurrent_block.initialize(layer_number)

    def _apply_experts(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        return self._attach_penalty(self.experts(hidden_states, rows, depth, self.recurrent_block))

    def _attach_penalty(self, output: torch.Tensor) -> torch.Tensor:
        """Attach the orthogonality penalty of the local experts to the backward pass."""
        coefficient = self.config.projection_orthogonality_coeff
        if coefficient == 0.0 or not (self.training and torch.is_grad_enabled()):
            return output
        penalty = self.experts.orthogonality_penalty()
        record_loss("orthogonality_loss", penalty, self.router)
        share = self.num_local_experts / self.config.num_moe_experts
        weight = coefficient * share * self._replica_ratio
        return MoEAuxLossAutoScaler.apply(output, penalty * weight)


class CombinedBlockMoELayer(BaseMoELayer):
    """Light experts, combined, and then one recurrent block over the whole sequence, with an MLP of that width."""

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recurrent_block = SequenceBlock(self.config, ffn_hidden_size, kwargs["pg_collection"])

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1; experts and block draw their weights."""
        super().set_layer_number(layer_number)
        self.recurrent_block.initialize(layer_number)

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, None]:
        """Route, compute and combine the experts, then iterate the block: its last state, [s, b, h], and no bias."""
        combined, _ = super().forward(hidden_states, padding_mask=inputs.padding_mask)
        grid = TokenGrid.of(combined, inputs.micro_batch, self.config, self.attn_tp_group)
        state = grid.noise(self.layer_number, self.config.recurrence_state_std)
        attention = {"attention_mask": inputs.attention_mask, "rotary_pos_emb": inputs.rotary_pos_emb}
        return self.recurrent_block(combined, state, inputs.micro_batch.depth, **attention), None
