"""Layers of the original transformer (Vaswani et al., arXiv 1706.03762), for groups that are repeated.

Attention without biases, a feed-forward part with them, matrices drawn as Glorot and Bengio do, and norms in front of
the two parts or behind their residual sums. Experts and routers are Megatron's, which have no biases.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.iterated_moe import IteratedMoELayer, RepeatedTransformerLayer
from more_megatron.blocks.layers import repeated_layers
from more_megatron.blocks.sandwich import RepeatedSandwichLayer
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost
from more_megatron.model.stack import Layer


def classic_layers(config: MoREConfig, *, post_norm: bool) -> tuple[Layer, ...]:
    """Return the layers of a group, dense or with experts.

    With `post_norm` norms stand behind the residual sums, as in the paper, and not in front of the parts.
    """
    # With its norms in front left out, a sandwich layer is a layer of the paper.
    layers = repeated_layers(config, RepeatedSandwichLayer if post_norm else RepeatedTransformerLayer)
    return tuple(_classic(config, layer, post_norm) for layer in layers)


class _Attention(SelfAttention):
    """Attention whose matrices are each drawn by its own size, though queries, keys and values are one here."""

    def __init__(self, config: MoREConfig, *args: Any, **kwargs: Any) -> None:
        queries = config.num_attention_heads * config.kv_channels
        super().__init__(_glorot(config, config.hidden_size, queries), *args, **kwargs)


def _classic(config: MoREConfig, layer: Layer, post_norm: bool) -> Layer:
    """Return a layer of Megatron's as one of the original transformer."""
    submodules: TransformerLayerSubmodules = layer.spec.submodules
    attention = dataclasses.replace(submodules.self_attention, module=_Attention)
    mlp: Any = submodules.mlp
    is_moe = mlp.func is IteratedMoELayer
    if post_norm:
        linear_qkv, _ = backend_of(config).linears()
        attention.submodules = dataclasses.replace(attention.submodules, linear_qkv=linear_qkv)
        if not is_moe:
            mlp = functools.partial(mlp.func, **{**mlp.keywords, "submodules": backend_of(config).mlp()})
    width = config.moe_ffn_hidden_size if is_moe else config.ffn_hidden_size
    submodules = dataclasses.replace(
        submodules,
        self_attention=attention,
        mlp=functools.partial(_drawn, mlp, width=width, has_biases=not is_moe),
        **({"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp} if post_norm else {}),
    )
    spec = ModuleSpec(module=layer.spec.module, params=layer.spec.params, submodules=submodules)
    biases = 2 * config.hidden_size if config.normalization == "LayerNorm" else 0
    if not is_moe:
        biases += (2 if config.gated_linear_unit else 1) * config.ffn_hidden_size + config.hidden_size
    return Layer(spec, layer.cost).with_cost(Cost(biases, biases))


def _drawn(build: Callable[..., Any], *, config: MoREConfig, width: int, has_biases: bool, **kwargs: Any) -> Any:
    """Build a feed-forward part or a mixture of experts whose matrices are h x `width`."""
    config = _glorot(config, config.hidden_size, width)
    config.add_bias_linear = has_biases
    return build(config=config, **kwargs)


def _glorot(config: MoREConfig, inputs: int, outputs: int) -> MoREConfig:
    """Return the configuration for a part that has matrices of this size, one way or the other."""
    config = copy.copy(config)
    bound = math.sqrt(6.0 / (inputs + outputs))
    config.init_method = functools.partial(torch.nn.init.uniform_, a=-bound, b=bound)
    config.output_layer_init_method = config.init_method
    return config
