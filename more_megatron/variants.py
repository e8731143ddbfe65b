"""The table of systems: how the layers of each are built.

Adding a system is one new file that defines its layer, and one row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from more_megatron.backends import final_norm, layer_submodules
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.moe.iterated_router import IteratedRouter
from more_megatron.moe.recurrent_moe import RecurrentMoETransformerLayer

__all__ = ["VARIANTS", "Variant", "block_spec", "get_variant"]


@dataclass(frozen=True)
class Variant:
    """One system.

    Attributes:
        summary: What it is, in one line.
        moe_layer: Builds the specification of a layer with experts.
        recurrent: Whether its depth comes from recurrence.
    """

    summary: str
    moe_layer: Callable[[MoREConfig], ModuleSpec]
    recurrent: bool = True


def _moe(config: MoREConfig) -> ModuleSpec:
    return ModuleSpec(module=TransformerLayer, submodules=layer_submodules(config, moe=True))


def _recurrent_moe(config: MoREConfig) -> ModuleSpec:
    submodules = _with_moe_parts(layer_submodules(config, moe=True), router=IteratedRouter)
    return ModuleSpec(module=RecurrentMoETransformerLayer, submodules=submodules)


VARIANTS: dict[str, Variant] = {
    "moe": Variant("Megatron's mixture of experts, the baseline", _moe, recurrent=False),
    "recurrent_moe": Variant("the MoE sub-layer iterated (Synthesis II, option C)", _recurrent_moe),
}


def get_variant(name: str) -> Variant:
    """Return a system by name.

    Raises:
        MoREError: If there is no system of that name; the message lists those there are.
    """
    if name not in VARIANTS:
        raise MoREError(f"--more-variant {name} does not exist: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def block_spec(config: MoREConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage for the system that `config` names.

    Args:
        config: Model configuration; `moe_layer_freq` says which layers have experts.
        vp_stage: Virtual pipeline stage, None without interleaving.
    """
    variant = get_variant(config.more_variant)
    moe_layer = variant.moe_layer(config)
    dense_layer = ModuleSpec(module=TransformerLayer, submodules=layer_submodules(config, moe=False))
    layers = [moe_layer if is_moe else dense_layer for is_moe in _moe_pattern(config)]
    return TransformerBlockSubmodules(
        layer_specs=[layers[index] for index in _local_layers(config, vp_stage)], layer_norm=final_norm(config)
    )


def _with_moe_parts(submodules: TransformerLayerSubmodules, **parts: object) -> TransformerLayerSubmodules:
    """Return the layer with some parts of its MoE layer replaced.

    Megatron's layer holds `functools.partial(MoELayer, submodules=...)`.
    """
    builder = submodules.mlp
    moe_submodules = dataclasses.replace(builder.keywords["submodules"], **parts)
    return dataclasses.replace(
        submodules, mlp=type(builder)(builder.func, **{**builder.keywords, "submodules": moe_submodules})
    )


def _moe_pattern(config: MoREConfig) -> list[bool]:
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(config.num_layers)]
    if len(frequency) != config.num_layers:
        raise MoREError(f"--moe-layer-freq names {len(frequency)} layers, --num-layers is {config.num_layers}")
    return [bool(entry) for entry in frequency]


def _local_layers(config: MoREConfig, vp_stage: int | None) -> range:
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
