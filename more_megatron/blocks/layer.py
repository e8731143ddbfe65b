"""Transformer and MoE layers that hand the experts what recurrence needs to know about the micro-batch."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from more_megatron.model.micro_batch import CARRIER, MicroBatch, Pass


@dataclass(frozen=True)
class LayerInputs:
    """What a layer passes to its MoE part besides the hidden states."""

    micro_batch: MicroBatch  # depth and sample ids
    padding_mask: torch.Tensor | None = None  # True for padding tokens, [b, s]
    rotary_pos_emb: torch.Tensor | None = None  # angles of the rotary embedding, [s, 1, 1, d]; None without one
    # True where attention is forbidden, [b, 1, s, s]; None for plain causal attention
    attention_mask: torch.Tensor | None = None
    current_pass: Any = None  # the pass, in a layer of a group that is repeated; others do not ask
    stream: torch.Tensor | None = None  # what experts read, [s, b, h], where it is not what the router reads

    @property
    def token_padding_mask(self) -> torch.Tensor | None:
        """The padding mask in the order of hidden states, [s, b]."""
        return None if self.padding_mask is None else self.padding_mask.transpose(0, 1).bool()


class MicroBatchTransformerLayer(TransformerLayer):
    """Megatron's layer, dense or with an MoE part that is told about the micro-batch.

    The MoE part is called as `mlp(hidden_states, inputs)` with `LayerInputs`. Selective recomputation of the MoE part
    covers the whole sub-layer: norm, MoE and residual.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_moe_layer:
            # Megatron's own checkpoint inside the MoE layer could not restore the arguments that are not tensors.
            self._recompute_moe = self.mlp.moe_layer_recompute
            self.mlp.moe_layer_recompute = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the hidden states after both sub-layers, [s, b, h], and no context: there is no encoder."""
        if not self.is_moe_layer:
            return super().forward(*args, **kwargs)
        hidden_states, context = self._forward_attention(*args, **kwargs)
        rotary_pos_emb, carrier = kwargs.get("rotary_pos_emb"), kwargs.get(CARRIER)
        inputs = LayerInputs(
            micro_batch=MicroBatch.of_layer(kwargs, self.config, self.training),
            padding_mask=kwargs.get("padding_mask"),
            rotary_pos_emb=rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb,
            attention_mask=kwargs.get("attention_mask"),
            current_pass=carrier if isinstance(carrier, Pass) else None,
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

    def _moe_sub_layer(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        # Fused norms hand the residual back with their output.
        normed, residual = normed if isinstance(normed, tuple) else (normed, hidden_states)
        residual = residual.float() if self.config.fp32_residual_connection else residual
        return self._forward_post_mlp(self.mlp(normed, inputs), residual)


class BaseMoELayer(MoELayer):
    """Megatron's MoE layer, which keeps all tokens in evaluation and lets experts of ours draw their weights.

    Which tokens exceed the capacity of an expert depends on tokens that come later: a model that drops is not causal,
    and its losses in evaluation would be those of no model that generates.
    """

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and let parts of ours draw their weights, which depend on it."""
        super().set_layer_number(layer_number)
        for part in self.children():
            if hasattr(part, "initialize"):
                part.initialize(layer_number)

    def train(self, mode: bool = True) -> Self:
        """In training drop tokens above capacity, if the configuration says so; in evaluation drop none."""
        super().train(mode)
        if self.config.moe_expert_capacity_factor is None:
            return self
        config = self.config
        if not mode:
            config = copy.copy(config)
            config.moe_expert_capacity_factor, config.moe_pad_expert_input_to_capacity = None, False
        self.router.config = config
        # The dispatcher expects the inputs of experts padded to capacity, or as they come.
        parts: list[Any] = [self.token_dispatcher, getattr(self.token_dispatcher, "_comm_manager", None)]
        for part in parts:
            if hasattr(part, "drop_and_pad"):
                part.drop_and_pad = config.moe_pad_expert_input_to_capacity
        return self


class MicroBatchMoELayer(BaseMoELayer):
    """Megatron's MoE layer whose experts are told about the micro-batch."""

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, None]:
        """Return the sum of routed and shared experts, [s, b, h], and no bias, given the hidden states."""
        shared_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, inputs.token_padding_mask)
        stream = hidden_states if inputs.stream is None else inputs.stream.to(hidden_states.dtype)
        dispatched, probs = self.dispatch(*self.preprocess(stream, probs, routing_map))
        rows = self.token_dispatcher.dispatch_postprocess(dispatched, probs)
        output = self.token_dispatcher.combine_preprocess(self.compute_experts(hidden_states, inputs, *rows))
        return self.postprocess(self.combine(output), shared_output), None

    def compute_experts(self, hidden_states: torch.Tensor, inputs: LayerInputs, *rows: torch.Tensor) -> torch.Tensor:
        """Return the weighed outputs of the local experts, [rows, h], given what the layer is called with, and `rows`.

        These are the rows that the dispatcher sent them, grouped by expert, [rows, h], how many each local expert has,
        [local experts], and the routing weight of each row, [rows].
        """
        return self.experts(*rows, inputs.micro_batch.depth)[0]
