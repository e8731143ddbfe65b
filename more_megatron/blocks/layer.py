"""Transformer and MoE layers that hand the experts what recurrence needs to know about the micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from more_megatron.blocks.base_moe import BaseMoELayer
from more_megatron.blocks.dispatch import DISPATCHERS
from more_megatron.blocks.rows import Rows
from more_megatron.model.depth import Depth
from more_megatron.model.loops import TokenGrid
from more_megatron.model.micro_batch import MicroBatch, Pass

__all__ = ["LayerInputs", "MicroBatchTransformerLayer", "RowMoELayer"]


@dataclass(frozen=True)
class LayerInputs:
    """What a layer passes to its MoE part besides the hidden states."""

    micro_batch: MicroBatch  # depth and sample ids
    padding_mask: torch.Tensor | None = None  # True for padding tokens, [b, s]
    rotary_pos_emb: torch.Tensor | None = None  # angles of the rotary embedding, [s, 1, 1, d]; None without one
    # True where attention is forbidden, [b, 1, s, s]; None for plain causal attention
    attention_mask: torch.Tensor | None = None
    current_pass: Any = None  # the pass, in a layer of a group that is repeated; others do not ask

    @property
    def token_padding_mask(self) -> torch.Tensor | None:
        """The padding mask in the order of hidden states, [s, b]."""
        return None if self.padding_mask is None else self.padding_mask.transpose(0, 1).bool()


class MicroBatchTransformerLayer(TransformerLayer):
    """Megatron's layer, with an MoE part that is told about the micro-batch.

    The MoE part is called as `mlp(hidden_states, inputs)` with `LayerInputs`. Selective recomputation of the MoE part
    covers the whole sub-layer: norm, MoE and residual.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron's own checkpoint inside the MoE layer could not restore the arguments that are not tensors.
        self._recompute_moe = self.mlp.moe_layer_recompute
        self.mlp.moe_layer_recompute = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the hidden states after both sub-layers, [s, b, h], and no context: there is no encoder."""
        hidden_states, context = self._forward_attention(*args, **kwargs)
        rotary_pos_emb = kwargs.get("rotary_pos_emb")
        inputs = LayerInputs(
            micro_batch=MicroBatch.of_layer(kwargs, self.config, self.training),
            padding_mask=kwargs.get("padding_mask"),
            rotary_pos_emb=rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb,
            attention_mask=kwargs.get("attention_mask"),
            current_pass=Pass.of_layer(kwargs),
        )
        return self._apply_moe(hidden_states, inputs), context

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        return self._recomputed(functools.partial(self._moe_sub_layer, inputs=inputs), hidden_states)

    def _recomputed(self, function: Callable[..., Any], *tensors: torch.Tensor | None) -> Any:
        """Apply `function`, keeping only its arguments where the MoE part is to be recomputed.

        Whatever carries gradient must be an argument: what the function closes over would be differentiated twice.
        """
        if self._recompute_moe and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(function, False, *tensors)
        return function(*tensors)

    def _moe_sub_layer(self, hidden_states: torch.Tensor, inputs: LayerInputs, *more: Any) -> torch.Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        # Fused norms hand the residual back with their output.
        normed, residual = normed if isinstance(normed, tuple) else (normed, hidden_states)
        residual = residual.float() if self.config.fp32_residual_connection else residual
        return self._forward_post_mlp(self.mlp(normed, inputs, *more), residual)


class RowMoELayer(BaseMoELayer):
    """Megatron's MoE layer for experts that mix tokens: they receive coordinates along with the rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatcher = DISPATCHERS[self.config.moe_token_dispatcher_type]
        self.token_dispatcher = dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=self.config,
            pg_collection=kwargs.get("pg_collection"),
        )
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        # Data-parallel replicas whose tokens meet on one expert rank.
        ranks_of_experts = self.token_dispatcher.tp_size * self.token_dispatcher.ep_size
        self._replicas = ranks_of_experts // self.attn_tp_group.size()

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, None]:
        """Return the sum of routed and shared experts, [s, b, h], and no bias, given the hidden states."""
        shared_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, inputs.token_padding_mask)
        dispatched, probs = self.dispatch(*self.preprocess(hidden_states, probs, routing_map))
        dispatched, tokens_per_expert, probs = self.token_dispatcher.dispatch_postprocess(dispatched, probs)
        rows, order = self._sort(hidden_states, tokens_per_expert, inputs)
        output = self._compute_experts(dispatched, probs, rows, order, inputs.micro_batch.depth)
        output = self.combine(self.token_dispatcher.combine_preprocess(output))
        return self.postprocess(output, shared_output), None

    def _compute_experts(
        self, dispatched: torch.Tensor, probs: torch.Tensor, rows: Rows, order: torch.Tensor, depth: Depth
    ) -> torch.Tensor:
        """Return the weighted output of the experts for the dispatched rows, [rows, h], in the dispatcher's order."""
        restore = torch.empty_like(order)
        restore[order] = torch.arange(len(order), device=order.device)
        output = self._apply_experts(dispatched.index_select(0, order), rows, depth)
        output = (output * probs.index_select(0, order).unsqueeze(-1)).to(output.dtype)
        return output.index_select(0, restore)

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
