"""What a model is: Megatron's arguments to `config.json` and back."""

import argparse
from collections.abc import Mapping
from typing import Any

from more_megatron.errors import MoREError, last_line
from more_megatron.flags import flag, layers_with_experts
from more_megatron.hf.conversion.json_files import check_config
from more_megatron.hf.exported.system import find_system, system_names
from more_megatron.systems import get_system

_OFF = (
    *("multi_latent_attention", "experimental_attention_variant", "linear_attention_freq", "attention_output_gate"),
    *("qk_l2_norm", "window_size", "no_rope_freq", "layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    *("apply_residual_connection_post_layernorm", "mtp_num_layers", "heterogeneous_layers_config_path"),
    *("hybrid_layer_pattern", "is_hybrid_model", "spec", "use_mup", "glu_linear_offset", "activation_func_clamp_value"),
    *("moe_latent_size", "moe_apply_probs_on_input", "moe_mlp_glu_interleave_size"),
    *("moe_shared_expert_glu_interleave_size", "moe_router_force_load_balancing", "moe_router_force_biased"),
)
# Fields of config.json that are arguments under another name; systems may lack the last of them.
_SAME = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "norm_eps": "layernorm_epsilon",
    "qk_norm": "qk_layernorm",
    "linear_bias": "add_bias_linear",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rotary_interleaved": "rotary_interleaved",
    "initializer_range": "init_method_std",
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "shared_expert_gate": "moe_shared_expert_gate",
    "router_score_function": "moe_router_score_function",
    "router_pre_softmax": "moe_router_pre_softmax",
    "router_scaling_factor": "moe_router_topk_scaling_factor",
    "router_num_groups": "moe_router_num_groups",
    "router_group_topk": "moe_router_group_topk",
    "router_expert_bias": "moe_router_enable_expert_bias",
    "router_dtype": "moe_router_dtype",
    "noise_seed": "seed",
    "state_std": "recurrence_state_std",
    "residual_scale": "recurrence_residual_scale",
    "router_logit_ema": "router_logit_ema",
}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
_POSITIONS = {"rope": "rope", "none": "none", "learned": "learned_absolute"}
# Arguments that the Hugging Face model knows under few values only. Of routing that is balanced otherwise it lacks the
# state.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF, (None, False, 0)),
    "softmax_type": ("vanilla",),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "position_embedding_type": tuple(_POSITIONS.values()),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}
# Activation function and whether it is gated, by argument; the fused bias and GELU is the tanh approximation:
# megatron/core/fusions/fused_bias_gelu.py.
_ACTIVATIONS = {
    "swiglu": ("silu", True),
    "quick_geglu": ("quick_gelu", True),
    "squared_relu": ("relu2", False),
    "bias_gelu_fusion": ("gelu_pytorch_tanh", False),
}
# Factor of Megatron's --use-rope-scaling, whatever else is asked for: megatron/training/models/gpt.py.
_ROPE_SCALING_FACTOR = 8.0
_OF_THE_CODE = {
    "architectures": ["MoREForCausalLM"],
    "model_type": "more",
    "auto_map": {
        "AutoConfig": "configuration_more.MoREConfig",
        "AutoModel": "modeling_more.MoREModel",
        "AutoModelForCausalLM": "modeling_more.MoREForCausalLM",
    },
}


def config_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of `config.json` for a model that Megatron trained, without token ids and dtype.

    Given are the arguments from its checkpoint.

    Raises:
        MoREError: If there is no such system, the Hugging Face model cannot express what the flags ask for, or they are
            not the arguments of a run.
    """
    try:
        return _config_from_args(args)
    except AttributeError as error:
        raise MoREError(f"they do not say {error.name}: they were not written by this version") from error
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise MoREError(last_line(error)) from error


def _config_from_args(args: argparse.Namespace) -> dict[str, Any]:
    _check(args)
    system, fields = get_system(args.more_variant), find_system(args.more_variant).all_fields
    heads = args.num_attention_heads
    activation, gated = _activation(args)
    config = {
        **_OF_THE_CODE,
        "variant": args.more_variant,
        **{name: getattr(args, argument) for name, argument in _SAME.items() if name in fields},
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else heads,
        "head_dim": args.kv_channels or args.hidden_size // heads,
        "hidden_act": activation,
        "gated_mlp": gated,
        "norm_type": args.normalization.lower(),
        "attention_bias": args.add_bias_linear or args.add_qkv_bias,
        "position_embedding": {theirs: ours for ours, theirs in _POSITIONS.items()}[args.position_embedding_type],
        "rope_scaling_factor": _ROPE_SCALING_FACTOR if args.use_rope_scaling else None,
        **_experts(args),
        "mean_recurrence": system.flags(args).evaluation_steps,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
    }
    if system.block_width is not None:
        config["recurrent_intermediate_size"] = system.ffn_hidden_size(args)
    config |= system.config_fields(args)
    check_config(config)
    return config


def args_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments that describe the model of a `config.json`, by name.

    Raises:
        MoREError: If Megatron cannot express it.
    """
    system, fields = get_system(config["variant"]), find_system(config["variant"]).all_fields
    groups, moe_layers = config["num_key_value_heads"], config["moe_layers"]
    if config["rope_scaling_factor"] not in (None, _ROPE_SCALING_FACTOR):
        raise MoREError(f"rope_scaling_factor {config['rope_scaling_factor']} has no counterpart in Megatron")
    arguments = {
        "more_variant": config["variant"],
        **{argument: config[name] for name, argument in _SAME.items() if name in fields},
        "group_query_attention": groups != config["num_attention_heads"],
        "num_query_groups": groups,
        "kv_channels": config["head_dim"],
        **_activation_flags(config),
        "normalization": _NORMS[config["norm_type"]],
        "add_qkv_bias": config["attention_bias"] and not config["linear_bias"],
        "position_embedding_type": _POSITIONS[config["position_embedding"]],
        "use_rope_scaling": config["rope_scaling_factor"] is not None,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        # Dense models have the default.
        "moe_layer_freq": 1 if len(set(moe_layers)) == 1 else [int(is_moe) for is_moe in moe_layers],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
        "recurrence_eval_steps": config["mean_recurrence"],
    }
    if system.block_width is not None:
        width, default = config["recurrent_intermediate_size"], system.block_width * config["hidden_size"]
        # A run that does not ask for a width fits where it is the default.
        arguments["recurrence_ffn_hidden_size"] = None if width == default else width
    return arguments | system.arguments(config)


def _check(args: argparse.Namespace) -> None:
    variant = getattr(args, "more_variant", None)
    if variant not in system_names():
        system = "a run without --more-variant" if variant is None else f"--more-variant {variant}"
        raise MoREError(f"the checkpoint is of {system}: systems that can be converted are {', '.join(system_names())}")
    for name, supported in _SUPPORTED.items():
        value = getattr(args, name, supported[0])
        # Several kinds of balancing make a list.
        if not all(part in supported for part in (value if isinstance(value, list) else [value])):
            raise MoREError(f"{flag(name)} {value} has no counterpart in the Hugging Face model")


def _activation(args: argparse.Namespace) -> tuple[str, bool]:
    plain = get_system(args.more_variant).activation
    asked = {name: getattr(args, name) for name in _ACTIVATIONS}
    asked["bias_gelu_fusion"] = asked["bias_gelu_fusion"] and args.add_bias_linear and plain == "gelu"
    return next((_ACTIVATIONS[name] for name, is_asked in asked.items() if is_asked), (plain, False))


def _activation_flags(config: Mapping[str, Any]) -> dict[str, bool]:
    found, plain = (config["hidden_act"], config["gated_mlp"]), get_system(config["variant"]).activation
    flags = {name: found == activation for name, activation in _ACTIVATIONS.items()}
    is_known = found == (plain, False) or (any(flags.values()) and not (flags["bias_gelu_fusion"] and plain != "gelu"))
    if not is_known:
        raise MoREError(f"hidden_act {found[0]} with gated_mlp {found[1]} has no counterpart in Megatron")
    return flags


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    coefficient = args.moe_aux_loss_coeff
    with_experts = layers_with_experts(args.moe_layer_freq, args.num_layers)
    return {
        "moe_layers": [args.num_experts is not None and has_experts for has_experts in with_experts],
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "router_aux_loss_coef": sum(coefficient) if isinstance(coefficient, list) else coefficient,
    }
