"""The layer of MoEUT (Csordas et al., arXiv 2405.16039), for a group that is repeated: peri-layernorm and sigma-MoE.

    x <- x + Attention(scores and routers from LN1 x, values from x)
    x <- x + MoE(router from LN2 x, experts on x),  MoE(x) = sum over the chosen j of sigmoid(l_j) relu(x K_j) V_j

Norms feed only what ends in a softmax or a sigmoid; what is added to the stream is made of the stream itself. Experts
(arXiv 2310.10837) are slices of one ReLU network, weighed by sigmoids that do not compete; they are many and small, 128
channels each, and those of a rank are two grouped products.
"""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.typed_torch import apply_module

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.entropy_balance import EntropyBalance, sum_over_positions
from more_megatron.blocks.experts import RoutedExperts
from more_megatron.blocks.iterated_moe import RepeatedTransformerLayer
from more_megatron.blocks.layer import LayerInputs, MicroBatchMoELayer
from more_megatron.blocks.layers import beside_experts_cost, moe_layer
from more_megatron.blocks.parameters import Weight
from more_megatron.blocks.router import IteratedRouter
from more_megatron.blocks.rows import RowPadding
from more_megatron.blocks.switchhead import SwitchHeadAttention, switchhead_cost
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.micro_batch import CARRIER
from more_megatron.model.stack import Layer


class SigmaRouter(IteratedRouter):
    """Megatron's router with sigmoids as they are for weights, and in training with experts that drop out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_function = "sigmoid"

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the weight, which depends on it."""
        super().set_layer_number(layer_number)
        if self.config.perform_initialization:
            initializer = BlockInitializer(self.config, layer_number)
            self.weight.data.copy_(initializer.rows_of_equal_norm(tuple(self.weight.shape), "sigma/router"))

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """Route as Megatron does, without dividing the weights of a token by their sum."""
        if self.training:
            self._call.carried = sum_over_positions(logits)
            if self.config.moeut_expert_dropout > 0.0:
                # The sigmoid of what dropped out is 0: it may be chosen for want of others, with weight 0.
                dropped = torch.rand_like(logits) < self.config.moeut_expert_dropout
                logits = logits.masked_fill(dropped, float("-inf"))
        probs, routing_map = super().routing(logits, padding_mask)
        if self.topk > 1:
            # The losses that Megatron attached hang on its weights, so its division is undone instead of left out.
            scores = torch.sigmoid(logits.float()).view_as(probs).masked_fill(probs == 0.0, 0.0)
            probs = probs * scores.sum(dim=-1, keepdim=True).to(probs.dtype)
        return probs, routing_map


class SigmaExperts(RoutedExperts):
    """Expert j computes `relu(x K_j) V_j`; h -> `moe_ffn_hidden_size` -> h, without gate and biases."""

    def build(self) -> None:
        hidden, width = self.config.hidden_size, self.config.moe_ffn_hidden_size
        draw_keys = functools.partial(BlockInitializer.scaled_normal, inputs=hidden)
        # The values of all experts together are one matrix.
        draw_values = functools.partial(BlockInitializer.scaled_normal, inputs=self.config.num_moe_experts * width)
        self.keys = self.linear_weights(Weight((width, hidden), "sigma/{}/keys", draw_keys, split_dim=0))
        self.values = self.linear_weights(Weight((hidden, width), "sigma/{}/values", draw_values, split_dim=1))

    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor, depth: Depth | None) -> torch.Tensor:
        inner = self.backend.linear(x, self.keys, padding.groups)
        # Weighed where rows are narrow.
        weighed = torch.relu(inner) * padding.pad(probs).unsqueeze(-1)
        return padding.unpad(self.backend.linear(weighed.to(inner.dtype), self.values, padding.groups))


class PeriTransformerLayer(RepeatedTransformerLayer):
    """A layer whose attention and MoE part are told of the stream and of its norm. Runs in loops only."""

    self_attention: SwitchHeadAttention

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
        hidden_states, sums = self._moe_pass(hidden_states, inputs, current)
        if sums is None or not current.in_graph:
            return hidden_states
        return self._balance.attach(hidden_states, sums, current, self.layer_number)

    def _moe_sub_layer(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        # The shared expert reads the norm, as the router does: a gated unit is no homogeneous function, and would grow
        # with the square of the stream.
        return super()._moe_sub_layer(hidden_states, dataclasses.replace(inputs, stream=hidden_states))


def peri_layer(config: MoREConfig) -> Layer:
    """Return a layer of MoEUT."""
    norm = backend_of(config).norm()
    parts = {"router": SigmaRouter, "experts": SigmaExperts}
    spec = moe_layer(config, layer=PeriTransformerLayer, moe=MicroBatchMoELayer, parts=parts).spec
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=norm,
        self_attention=ModuleSpec(SwitchHeadAttention),
        pre_mlp_layernorm=norm,
        # No norm is part of a linear layer, on any backend.
        sharded_state_dict_keys_map={},
    )

    def cost(seq_length: int) -> Cost:
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        norms = (4 if config.normalization == "LayerNorm" else 2) * hidden
        expert = linear_cost(hidden, width) + linear_cost(width, hidden)
        moe = expert.routed(config.num_moe_experts, config.moe_router_topk) + beside_experts_cost(config)
        return switchhead_cost(config, seq_length) + moe + Cost(norms, norms)

    return Layer(ModuleSpec(PeriTransformerLayer, submodules=submodules), cost)
