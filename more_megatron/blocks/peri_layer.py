"""The peri-layernorm layer of MoEUT (Csordas et al., arXiv 2405.16039), for a group that is repeated.

    x <- x + Attention(scores and routers from LN1 x, values from x)
    x <- x + MoE(router from LN2 x, experts on x)

Norms feed only what ends in a softmax or a sigmoid; what is added to the stream is made of the stream itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.typed_torch import apply_module

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.entropy_balance import EntropyBalance
from more_megatron.blocks.iterated_moe import RepeatedMoETransformerLayer
from more_megatron.blocks.layer import LayerInputs
from more_megatron.blocks.layers import beside_experts_cost
from more_megatron.blocks.sigma_moe import SigmaExperts, SigmaMoELayer, SigmaRouter, sigma_experts_cost
from more_megatron.blocks.switchhead import SwitchHeadAttention, switchhead_cost
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost
from more_megatron.model.micro_batch import CARRIER
from more_megatron.model.stack import Layer

__all__ = ["PeriTransformerLayer", "peri_layer"]


class PeriTransformerLayer(RepeatedMoETransformerLayer):
    """A layer whose attention and MoE part are told of the stream and of its norm. Runs in loops only."""

    self_attention: SwitchHeadAttention
    mlp: SigmaMoELayer

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        coefficient = config.moeut_balance_coeff
        self._balance = EntropyBalance("expert_balance_loss", coefficient, self.config, self.pg_collection)

    def _forward_attention(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if packed_seq_params is not None:
            raise MoREError("the entropy of a sequence needs its rows: leave out --dataloader-inter-document-masking")
        normed = apply_module(self.input_layernorm)(hidden_states)
        output = self.self_attention(
            normed, hidden_states.to(normed.dtype), kwargs[CARRIER], attention_mask, rotary_pos_emb
        )
        residual = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        # Megatron's fused kernels for the residual want gradients enabled, whatever the mode.
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add((output, None), residual, self.hidden_dropout), None

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        current = inputs.current_pass

        def sub_layer(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            step = self._router_step(current)
            normed = self._forward_pre_mlp_layernorm(stream)
            residual = stream.float() if self.config.fp32_residual_connection else stream
            output = self.mlp(normed, stream.to(normed.dtype), inputs, step)
            current.leave((self.layer_number, "map"), step.routing_map)
            return self._forward_post_mlp(output, residual), step.sums

        hidden_states, sums = self._recomputed(sub_layer, hidden_states)
        if sums is None or not current.in_graph:
            return hidden_states
        return self._balance.attach(hidden_states, sums, current, self.layer_number)


def peri_layer(config: MoREConfig) -> Layer:
    """Return a layer of MoEUT."""
    submodules, norm = backend_of(config).layer_submodules(config, moe=True), backend_of(config).norm()
    # Megatron's submodules hold `functools.partial(MoELayer, submodules=...)`.
    megatron_moe: Any = submodules.mlp
    moe = dataclasses.replace(megatron_moe.keywords["submodules"], router=SigmaRouter, experts=SigmaExperts)
    submodules = dataclasses.replace(
        submodules,
        input_layernorm=norm,
        self_attention=ModuleSpec(SwitchHeadAttention),
        pre_mlp_layernorm=norm,
        mlp=functools.partial(SigmaMoELayer, submodules=moe),
        # No norm is part of a linear layer, on any backend.
        sharded_state_dict_keys_map={},
    )

    def cost(seq_length: int) -> Cost:
        norms = (4 if config.normalization == "LayerNorm" else 2) * config.hidden_size
        moe = sigma_experts_cost(config) + beside_experts_cost(config)
        return switchhead_cost(config, seq_length) + moe + Cost(norms, norms)

    return Layer(ModuleSpec(PeriTransformerLayer, submodules=submodules), cost)
