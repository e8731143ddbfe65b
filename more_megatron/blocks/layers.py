"""Layers and stacks in the forms that several systems have."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.iterated_moe import IteratedMoELayer, RepeatedTransformerLayer
from more_megatron.blocks.layer import BaseMoELayer, MicroBatchTransformerLayer
from more_megatron.blocks.router import IteratedRouter
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.flags import layers_with_experts
from more_megatron.model.costs import Cost, attention_cost, linear_cost, mlp_cost
from more_megatron.model.stack import Group, Layer, Stack


def decoder_stack(config: MoREConfig, moe: Layer) -> Stack:
    """Return a stack without loops: layers with experts, and dense ones where `moe_layer_freq` says so."""
    layers = _arranged(config, TransformerLayer, lambda: moe)
    return Stack(config, (Group(layers),), backend_of(config).norm())


def expert_stack(config: MoREConfig, moe: Callable[..., MoELayer], experts: Any, cost: Callable[[int], Cost]) -> Stack:
    """Return a stack without loops whose experts are others than Megatron's and know their micro-batch.

    Args:
        moe: MoE layer.
        experts: Its routed experts.
        cost: Cost of them and of what they share, given the length of a sequence.
    """
    layer = MicroBatchTransformerLayer
    return decoder_stack(config, moe_layer(config, layer=layer, moe=moe, parts={"experts": experts}, experts_cost=cost))


def plain_layers(config: MoREConfig, layer: type[TransformerLayer] = TransformerLayer) -> tuple[Layer, ...]:
    """Return the layers of Megatron's model, dense or with experts."""
    return _arranged(config, layer, lambda: moe_layer(config, layer=layer))


def repeated_layers(
    config: MoREConfig, layer: type[RepeatedTransformerLayer] = RepeatedTransformerLayer
) -> tuple[Layer, ...]:
    """Return the layers of Megatron's model, dense or with experts, for groups that are repeated."""
    parts = {"router": IteratedRouter}
    moe = functools.partial(moe_layer, config, layer=layer, moe=IteratedMoELayer, parts=parts)
    return _arranged(config, layer, moe)


def _arranged(config: MoREConfig, layer: type[TransformerLayer], moe: Callable[[], Layer]) -> tuple[Layer, ...]:
    """Return the layers of a model, as `moe_layer_freq` arranges those with and those without experts.

    `moe` returns a layer with experts, which only a configuration with experts has.
    """
    submodules = backend_of(config).layer_submodules(config, moe=False)

    def cost(seq_length: int) -> Cost:
        return _attention_part_cost(config, seq_length) + mlp_cost(config, config.ffn_hidden_size)

    dense = Layer(ModuleSpec(module=layer, submodules=submodules), cost)
    if config.num_moe_experts is None:
        return (dense,) * config.num_layers
    arranged = layers_with_experts(config.moe_layer_freq, config.num_layers)
    if len(arranged) != config.num_layers:
        raise MoREError(f"--moe-layer-freq names {len(arranged)} layers, --num-layers is {config.num_layers}")
    with_experts = moe()
    return tuple(with_experts if has_experts else dense for has_experts in arranged)


def moe_layer(
    config: MoREConfig,
    *,
    layer: type[TransformerLayer] = TransformerLayer,
    moe: Callable[..., MoELayer] = BaseMoELayer,
    parts: dict[str, Any] | None = None,
    experts_cost: Callable[[int], Cost] | None = None,
    repeated: bool = False,
) -> Layer:
    """Return a layer with experts.

    Args:
        layer: Transformer layer that holds the MoE part.
        moe: MoE layer.
        parts: Parts of the MoE layer that take the place of Megatron's: `experts`, `router`, `shared_experts`.
        experts_cost: Cost of the routed experts and of what they share, given the length of a sequence. Default: that
            of Megatron's.
        repeated: Whether the MoE part, and nothing else of the layer, runs in every step of a recurrence.
    """
    submodules = backend_of(config).layer_submodules(config, moe=True)
    # Megatron's submodules hold `functools.partial(MoELayer, submodules=...)`.
    megatron_moe: Any = submodules.mlp
    moe_submodules = dataclasses.replace(megatron_moe.keywords["submodules"], **(parts or {}))
    mlp = functools.partial(moe, submodules=moe_submodules)
    spec = ModuleSpec(module=layer, submodules=dataclasses.replace(submodules, mlp=mlp))

    def cost(seq_length: int) -> Cost:
        if experts_cost is not None:
            experts = experts_cost(seq_length)
        else:
            expert = mlp_cost(config, config.moe_ffn_hidden_size)
            experts = expert.routed(config.num_moe_experts, config.moe_router_topk)
        part = experts + beside_experts_cost(config)
        return _attention_part_cost(config, seq_length) + (part.in_every_step() if repeated else part)

    return Layer(spec, cost)


def beside_experts_cost(config: MoREConfig) -> Cost:
    """Return the cost of the router and of the shared expert."""
    router, shared = linear_cost(config.hidden_size, config.num_moe_experts), config.moe_shared_expert_intermediate_size
    return router if shared is None else router + mlp_cost(config, shared)


def _attention_part_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of attention and of the two norms of a layer."""
    norms = 2 * config.hidden_size
    return attention_cost(config, seq_length) + Cost(norms, norms)
