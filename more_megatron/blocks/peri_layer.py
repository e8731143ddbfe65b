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

from more_megatron.blocks.backends import backend_of, layer_submodules
from more_megatron.blocks.entropy_balance import EntropyBalance
from more_megatron.blocks.iterated_moe import RepeatedMoETransformerLayer
from more_megatron.blocks.layer import LayerInputs
from more_megatron.blocks.router import RouterStep
from more_megatron.blocks.sigma_moe import SigmaMoELayer
from more_megatron.blocks.switchhead import SwitchHeadAttention
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.micro_batch import Pass

__all__ = ["PeriTransformerLayer", "peri_layer_spec"]


class PeriTransformerLayer(RepeatedMoETransformerLayer):
    """A layer whose attention and MoE part are told of the stream and of its norm. Runs in loops only.

    Args:
        config: Model configuration.
        args: As for Megatron's layer.
        balance_coeff: Coefficient of the entropy balance of the MoE part.
        kwargs: As for Megatron's layer.
    """

    self_attention: SwitchHeadAttention
    mlp: SigmaMoELayer

    def __init__(self, config: MoREConfig, *args: Any, balance_coeff: float, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._balance = EntropyBalance("expert_balance_loss", balance_coeff, self.config, self.pg_collection)

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
            normed, hidden_states.to(normed.dtype), _current(kwargs), attention_mask, rotary_pos_emb
        )
        residual = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        # Megatron's fused kernels for the residual want gradients enabled, whatever the mode.
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add((output, None), residual, self.hidden_dropout), None

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        current = inputs.current_pass
        assert current is not None, "a repeated layer was called outside of a loop"

        def sub_layer(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            weight = 1.0 / max(current.micro_batch.depth.grad_steps, 1)
            former_map = current.former.get((self.layer_number, "map"))
            step = RouterStep(current.index, weight, current.is_counted(), former_map=former_map, keeps_map=True)
            normed = self._forward_pre_mlp_layernorm(stream)
            residual = stream.float() if self.config.fp32_residual_connection else stream
            output = self.mlp(normed, stream.to(normed.dtype), inputs, step)
            return self._forward_post_mlp(output, residual), self.mlp.router.take_sums()

        hidden_states, sums = self._recomputed(sub_layer, hidden_states)
        routing_map = self.mlp.router.take_map()
        if routing_map is not None:
            current.leave((self.layer_number, "map"), routing_map)
        if sums is None or not current.in_graph:
            return hidden_states
        return self._balance.attach(hidden_states, sums, current, self.layer_number)


def _current(kwargs: dict[str, Any]) -> Pass:
    current = Pass.of_layer(kwargs)
    assert current is not None, "a repeated layer was called outside of a loop"
    return current


def peri_layer_spec(
    config: MoREConfig, *, attention: dict[str, Any], moe_parts: dict[str, Any], balance_coeff: float
) -> ModuleSpec:
    """Return how the layer is built.

    Args:
        config: Model configuration.
        attention: Arguments of `SwitchHeadAttention` that Megatron does not pass.
        moe_parts: Parts of the MoE layer that take the place of Megatron's.
        balance_coeff: Coefficient of the entropy balance of the MoE part.
    """
    submodules, norm = layer_submodules(config, moe=True), backend_of(config).norm()
    # Megatron's submodules hold `functools.partial(MoELayer, submodules=...)`.
    megatron_moe: Any = submodules.mlp
    moe_submodules = dataclasses.replace(megatron_moe.keywords["submodules"], **moe_parts)
    submodules = dataclasses.replace(
        submodules,
        input_layernorm=norm,
        self_attention=ModuleSpec(SwitchHeadAttention, params=attention),
        pre_mlp_layernorm=norm,
        mlp=functools.partial(SigmaMoELayer, submodules=moe_submodules),
        # No norm is part of a linear layer, on any backend.
        sharded_state_dict_keys_map={},
    )
    return ModuleSpec(PeriTransformerLayer, params={"balance_coeff": balance_coeff}, submodules=submodules)
