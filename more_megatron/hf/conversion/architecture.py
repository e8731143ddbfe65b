"""What a model is: Megatron's arguments to `config.json` and back."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags, flag
from more_megatron.systems import get_system, names

__all__ = ["args_from_config", "config_from_args"]

# Arguments that the Hugging Face model knows under one value only.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "is_hybrid_model": (False,),
    "spec": (None,),
    "use_mup": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
}

_POSITIONS = {"rope": "rope", "none": "none", "learned_absolute": "learned"}
_ROUTINGS_WITH_A_STATE = ("sinkhorn", "quantile_balancing")
# Factor of Megatron's --use-rope-scaling, whatever else is asked for: megatron/training/models/gpt.py.
_ROPE_SCALING_FACTOR = 8.0


def config_from_args(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Return the content of `config.json` for a model that Megatron trained, without token ids and dtype.

    Args:
        args: Arguments from the checkpoint.
        vocab_size: Rows of the embedding, with padding.

    Raises:
        MoREError: If the system is not in the table, or the Hugging Face model cannot express what the flags ask for.
    """
    _check(args)
    activation, gated = _activation(args)
    heads = args.num_attention_heads
    return {
        "architectures": ["MoREForCausalLM"],
        "model_type": "more",
        "auto_map": {
            "AutoConfig": "configuration_more.MoREConfig",
            "AutoModel": "modeling_more.MoREModel",
            "AutoModelForCausalLM": "modeling_more.MoREForCausalLM",
        },
        "variant": args.more_variant,
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else heads,
        "head_dim": args.kv_channels or args.hidden_size // heads,
        "intermediate_size": args.ffn_hidden_size,
        "hidden_act": activation,
        "gated_mlp": gated,
        "norm_type": args.normalization.lower(),
        "norm_eps": args.layernorm_epsilon,
        "qk_norm": args.qk_layernorm,
        "attention_bias": args.add_bias_linear or args.add_qkv_bias,
        "linear_bias": args.add_bias_linear,
        **_positions(args),
        **_experts(args),
        **_recurrence(args),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "initializer_range": args.init_method_std,
    }


def args_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments that describe the model of a `config.json`, by name.

    Raises:
        MoREError: If Megatron cannot express it.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["recurrent_intermediate_size"]
    if config["rope_scaling_factor"] not in (None, _ROPE_SCALING_FACTOR):
        raise MoREError(f"rope_scaling_factor {config['rope_scaling_factor']} has no counterpart in Megatron")
    return {
        "more_variant": config["variant"],
        "padded_vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config["head_dim"],
        "ffn_hidden_size": config["intermediate_size"],
        **_activation_flags(config),
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[config["norm_type"]],
        "layernorm_epsilon": config["norm_eps"],
        "qk_layernorm": config["qk_norm"],
        "add_bias_linear": config["linear_bias"],
        "add_qkv_bias": config["attention_bias"] and not config["linear_bias"],
        "position_embedding_type": {hf: megatron for megatron, hf in _POSITIONS.items()}[config["position_embedding"]],
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": config["rope_theta"],
        "rotary_percent": config["rotary_percent"],
        "rotary_interleaved": config["rotary_interleaved"],
        "use_rope_scaling": config["rope_scaling_factor"] is not None,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "init_method_std": config["initializer_range"],
        "num_experts": config["num_experts"],
        "moe_layer_freq": 1 if all(config["moe_layers"]) else [int(is_moe) for is_moe in config["moe_layers"]],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": config["shared_expert_gate"],
        "moe_router_score_function": config["router_score_function"],
        "moe_router_pre_softmax": config["router_pre_softmax"],
        "moe_router_topk_scaling_factor": config["router_scaling_factor"],
        "moe_router_num_groups": config["router_num_groups"],
        "moe_router_group_topk": config["router_group_topk"],
        "moe_router_enable_expert_bias": config["router_expert_bias"],
        "moe_router_dtype": config["router_dtype"],
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
        "recurrence_eval_steps": config["mean_recurrence"],
        "recurrence_ffn_hidden_size": None
        if width == _default_width(config["variant"], config["hidden_size"])
        else width,
        "recurrence_residual_scale": config["residual_scale"],
        "recurrence_state_std": config["state_std"],
        "router_logit_ema": config["router_logit_ema"],
        "seed": config["noise_seed"],
    }


def _check(args: argparse.Namespace) -> None:
    variant = getattr(args, "more_variant", None)
    if variant not in names():
        system = "a run without --more-variant" if variant is None else f"--more-variant {variant}"
        raise MoREError(f"the checkpoint is of {system}: systems that can be converted are {', '.join(names())}")
    for name, supported in _UNSUPPORTED.items():
        value = getattr(args, name, supported[0])
        if value not in supported:
            raise MoREError(f"{flag(name)} {value} has no counterpart in the Hugging Face model")
    if args.position_embedding_type not in _POSITIONS:
        raise MoREError(
            f"--position-embedding-type {args.position_embedding_type} has no counterpart in the Hugging Face model, "
            f"which knows {', '.join(_POSITIONS)}"
        )
    balancing = args.moe_router_load_balancing_type
    for name in [balancing] if isinstance(balancing, str) else balancing:
        if name in _ROUTINGS_WITH_A_STATE:
            raise MoREError(f"--moe-router-load-balancing-type {name} has no counterpart in the Hugging Face model")


def _activation(args: argparse.Namespace) -> tuple[str, bool]:
    if args.swiglu:
        return "silu", True
    if args.quick_geglu:
        return "quick_gelu", True
    if args.squared_relu:
        return "relu2", False
    # The fused bias and GELU is the tanh approximation: megatron/core/fusions/fused_bias_gelu.py.
    return ("gelu_pytorch_tanh" if args.add_bias_linear and args.bias_gelu_fusion else "gelu"), False


def _activation_flags(config: Mapping[str, Any]) -> dict[str, bool]:
    activation, gated = config["hidden_act"], config["gated_mlp"]
    known = {("silu", True), ("quick_gelu", True), ("relu2", False), ("gelu", False), ("gelu_pytorch_tanh", False)}
    if (activation, gated) not in known:
        raise MoREError(f"hidden_act {activation} with gated_mlp {gated} has no counterpart in Megatron")
    return {
        "swiglu": activation == "silu",
        "quick_geglu": activation == "quick_gelu",
        "squared_relu": activation == "relu2",
        "bias_gelu_fusion": activation == "gelu_pytorch_tanh",
    }


def _positions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "position_embedding": _POSITIONS[args.position_embedding_type],
        "max_position_embeddings": args.max_position_embeddings,
        "rope_theta": args.rotary_base,
        "rotary_percent": args.rotary_percent,
        "rotary_interleaved": args.rotary_interleaved,
        "rope_scaling_factor": _ROPE_SCALING_FACTOR if args.use_rope_scaling else None,
    }


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    frequency, layers = args.moe_layer_freq, args.num_layers
    if isinstance(frequency, int):
        moe_layers = [layer % frequency == 0 for layer in range(layers)]
    else:
        moe_layers = [bool(is_moe) for is_moe in frequency]
    coefficient = args.moe_aux_loss_coeff
    return {
        "moe_layers": moe_layers,
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
        "shared_expert_gate": args.moe_shared_expert_gate,
        "router_score_function": args.moe_router_score_function,
        "router_pre_softmax": args.moe_router_pre_softmax,
        "router_scaling_factor": args.moe_router_topk_scaling_factor,
        "router_num_groups": args.moe_router_num_groups,
        "router_group_topk": args.moe_router_group_topk,
        "router_expert_bias": args.moe_router_enable_expert_bias,
        "router_dtype": args.moe_router_dtype,
        "router_aux_loss_coef": sum(coefficient) if isinstance(coefficient, list) else coefficient,
    }


def _recurrence(args: argparse.Namespace) -> dict[str, Any]:
    default = _default_width(args.more_variant, args.hidden_size)
    return {
        "recurrent_intermediate_size": None if default is None else args.recurrence_ffn_hidden_size or default,
        "mean_recurrence": MoREFlags.of(args).evaluation_steps,
        "residual_scale": args.recurrence_residual_scale,
        "router_logit_ema": args.router_logit_ema,
        "state_std": args.recurrence_state_std,
        "noise_seed": args.seed,
    }


def _default_width(variant: str, hidden_size: int) -> int | None:
    """Return the width of the MLP in a recurrent block if nothing is said; None where there is no such block."""
    factor = get_system(variant).block_width
    return None if factor is None else factor * hidden_size
