"""The table of systems: how the layers of each are built.

Adding a system is one new file that defines its layer, and one row here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from more_megatron.blocks.backends import backend_of, final_norm, layer_submodules
from more_megatron.blocks.block_experts import RecurrentExperts, recurrent_experts_cost
from more_megatron.blocks.block_moe import CombinedBlockMoELayer, SharedBlockMoELayer
from more_megatron.blocks.capacity import CapacityInTrainingMoELayer
from more_megatron.blocks.dispatch import DISPATCHERS
from more_megatron.blocks.ffn_cost import ffn_experts_cost
from more_megatron.blocks.iterated_moe import IteratedMoELayer, RecurrentMoETransformerLayer
from more_megatron.blocks.layer import MicroBatchTransformerLayer, RowMoELayer
from more_megatron.blocks.light_experts import LightExperts, light_experts_cost
from more_megatron.blocks.precision import check_precision
from more_megatron.blocks.projection_experts import ProjectionExperts, projection_experts_cost
from more_megatron.blocks.router import IteratedRouter
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost, attention_cost, gated_mlp_cost, linear_cost

__all__ = ["VARIANTS", "Variant", "block_spec", "check_variant", "get_variant", "layer_cost", "model_cost"]


@dataclass(frozen=True)
class Variant:
    """One system.

    Attributes:
        summary: What it is, in one line.
        layer: Transformer layer that holds the MoE part.
        moe: MoE layer.
        parts: Parts of the MoE layer that take the place of Megatron's.
        experts_cost: Cost of the routed experts, and of the block they share, given configuration and sequence length.
        recurrent: Whether its depth comes from recurrence.
        mixes_tokens: Whether experts let the tokens that were sent to them attend to each other.
        has_projections: Whether experts are projections around a shared block.
        iterates_router: Whether the router is asked in every step.
    """

    summary: str
    layer: type[TransformerLayer] = TransformerLayer
    moe: type[MoELayer] = CapacityInTrainingMoELayer
    parts: dict[str, Any] = field(default_factory=dict)
    experts_cost: Callable[[MoREConfig, int], Cost] = ffn_experts_cost
    recurrent: bool = True
    mixes_tokens: bool = False
    has_projections: bool = False
    iterates_router: bool = False


VARIANTS: dict[str, Variant] = {
    "moe": Variant(
        "Megatron's mixture of experts, the baseline",
        recurrent=False,
    ),
    "recurrent_experts": Variant(
        "each expert is a recurrent block of its own (Synthesis I, option A)",
        layer=MicroBatchTransformerLayer,
        moe=RowMoELayer,
        parts={"experts": RecurrentExperts},
        experts_cost=recurrent_experts_cost,
        mixes_tokens=True,
    ),
    "shared_block": Variant(
        "experts are projections around one recurrent block (Synthesis I, option B)",
        layer=MicroBatchTransformerLayer,
        moe=SharedBlockMoELayer,
        parts={"experts": ProjectionExperts},
        experts_cost=projection_experts_cost,
        mixes_tokens=True,
        has_projections=True,
    ),
    "shared_block_ffn": Variant(
        "light experts, combined, then one recurrent block over the sequence (option B as in the summary)",
        layer=MicroBatchTransformerLayer,
        moe=CombinedBlockMoELayer,
        parts={"experts": LightExperts},
        experts_cost=light_experts_cost,
    ),
    "recurrent_moe": Variant(
        "the MoE sub-layer iterated (Synthesis II, option C)",
        layer=RecurrentMoETransformerLayer,
        moe=IteratedMoELayer,
        parts={"router": IteratedRouter},
        iterates_router=True,
    ),
}


def get_variant(name: str) -> Variant:
    """Return a system by name.

    Raises:
        MoREError: If there is no system of that name; the message lists those there are.
    """
    if name not in VARIANTS:
        raise MoREError(f"--more-variant {name} does not exist: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def check_variant(config: MoREConfig) -> None:
    """Refuse what the system of `config` cannot do.

    Raises:
        MoREError: If the layout keeps tokens apart that must meet, or a field has no meaning for the system; the
            message names the flags to change.
    """
    variant = get_variant(config.more_variant)
    name = f"--more-variant {config.more_variant}"
    if variant.recurrent and config.context_parallel_size > 1:
        raise MoREError(f"{name} does not support --context-parallel-size {config.context_parallel_size}: use 1")
    if variant.parts.get("experts") is not None:
        if config.add_bias_linear:
            raise MoREError(f"{name} has no biases: leave out --enable-bias-linear")
        check_precision(config, name)
    if variant.recurrent and config.fp8 is not None and _recomputes_moe(config):
        raise MoREError(
            f"{name} recomputes its MoE part outside of FP8: give --recompute-granularity full, or leave moe out of "
            "--recompute-modules"
        )
    if variant.mixes_tokens:
        _check_mixing(config, name)
    if config.projection_orthogonality_coeff or config.projection_dropout:
        if not variant.has_projections:
            raise MoREError(
                f"{name} has no projections: leave out --projection-orthogonality-coeff and --projection-dropout"
            )
        if config.calculate_per_token_loss and config.projection_orthogonality_coeff:
            raise MoREError("--projection-orthogonality-coeff and --calculate-per-token-loss exclude each other")
    if (config.router_logit_ema or config.router_min_entropy) and not variant.iterates_router:
        raise MoREError(f"{name} asks its router once: leave out --router-logit-ema and --router-min-entropy")
    if config.recurrence_residual_scale != 1.0 and not variant.iterates_router:
        raise MoREError(f"{name} has no iterated residual: leave out --recurrence-residual-scale")


def _recomputes_moe(config: MoREConfig) -> bool:
    return config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ())


def _check_mixing(config: MoREConfig, name: str) -> None:
    """Check what experts need that let tokens attend to each other."""
    expert_ranks = config.expert_model_parallel_size * config.expert_tensor_parallel_size
    tensor_ranks = config.tensor_model_parallel_size
    if expert_ranks % tensor_ranks != 0:
        raise MoREError(
            f"{name} needs all tokens of a sequence on one expert rank: --expert-model-parallel-size "
            f"{config.expert_model_parallel_size} times --expert-tensor-parallel-size "
            f"{config.expert_tensor_parallel_size} must be a multiple of --tensor-model-parallel-size {tensor_ranks}; "
            "raise one of the former"
        )
    if 1 < config.expert_tensor_parallel_size < tensor_ranks and config.more_variant == "shared_block":
        raise MoREError(f"{name} needs --expert-tensor-parallel-size 1 or {tensor_ranks}, like the tensor parallelism")
    if config.moe_token_dispatcher_type not in DISPATCHERS:
        raise MoREError(f"{name} needs --moe-token-dispatcher-type {' or '.join(DISPATCHERS)}")
    if config.moe_pad_expert_input_to_capacity or config.moe_router_padding_for_quantization:
        raise MoREError(
            f"{name} attends to every row it is given: leave out --moe-pad-expert-input-to-capacity and "
            "--moe-router-padding-for-quantization"
        )


def block_spec(config: MoREConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage for the system that `config` names.

    Args:
        config: Model configuration; `moe_layer_freq` says which layers have experts.
        vp_stage: Virtual pipeline stage, None without interleaving.
    """
    moe_layer = _moe_layer(config)
    dense_layer = ModuleSpec(module=TransformerLayer, submodules=layer_submodules(config, moe=False))
    layers = [moe_layer if is_moe else dense_layer for is_moe in _moe_pattern(config)]
    return TransformerBlockSubmodules(
        layer_specs=[layers[index] for index in _local_layers(config, vp_stage)], layer_norm=final_norm(config)
    )


def model_cost(config: MoREConfig, vocab_size: int, seq_length: int, tied: bool = False) -> Cost:
    """Return the cost of a whole model.

    Args:
        config: Model configuration.
        vocab_size: Size of the vocabulary, with padding.
        seq_length: Length of a sequence.
        tied: Whether input and output embeddings are one.
    """
    embedding = linear_cost(config.hidden_size, vocab_size)
    head = Cost(once=embedding.once) if tied else embedding
    ends = Cost(embedding.parameters, config.hidden_size) + head + Cost(config.hidden_size, config.hidden_size)
    return sum((layer_cost(config, seq_length, is_moe) for is_moe in _moe_pattern(config)), ends)


def layer_cost(config: MoREConfig, seq_length: int, is_moe: bool) -> Cost:
    """Return the cost of a layer, with or without experts."""
    hidden = config.hidden_size
    attention = attention_cost(config, seq_length) + Cost(2 * hidden, 2 * hidden)
    if not is_moe:
        return attention + gated_mlp_cost(hidden, config.ffn_hidden_size)
    variant = get_variant(config.more_variant)
    moe = variant.experts_cost(config, seq_length) + linear_cost(hidden, config.num_moe_experts)
    if config.moe_shared_expert_intermediate_size is not None:
        moe = moe + gated_mlp_cost(hidden, config.moe_shared_expert_intermediate_size)
    return attention + (moe.in_every_step() if variant.iterates_router else moe)


def _moe_layer(config: MoREConfig) -> ModuleSpec:
    """Return the specification of a layer with experts.

    Megatron's submodules hold `functools.partial(MoELayer, submodules=...)`.
    """
    variant = get_variant(config.more_variant)
    submodules = layer_submodules(config, moe=True)
    megatron_moe: Any = submodules.mlp
    moe_submodules = dataclasses.replace(megatron_moe.keywords["submodules"], **variant.parts)
    moe: Any = functools.partial(_looped, variant.moe) if variant.iterates_router else variant.moe
    mlp = functools.partial(moe, submodules=moe_submodules)
    return ModuleSpec(module=variant.layer, submodules=dataclasses.replace(submodules, mlp=mlp))


def _looped(moe: Callable[..., MoELayer], *, config: MoREConfig, **kwargs: Any) -> MoELayer:
    """Build a layer whose parts, Megatron's own among them, run in every step of a recurrence."""
    return moe(config=backend_of(config).looped(config), **kwargs)


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
