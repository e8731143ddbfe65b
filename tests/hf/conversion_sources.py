"""Checkpoints of random weights, written without a trainer."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from more_megatron.hf.conversion.megatron_writer import write_release
from more_megatron.hf.mapping import entries
from more_megatron.systems import get_system

# Arguments of a run, as far as a conversion reads them.
VALUES: dict[str, Any] = {
    "more_variant": "shared_block",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "group_query_attention": False,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 32,
    "swiglu": True,
    "quick_geglu": False,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "qk_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "max_position_embeddings": 16,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "num_experts": 4,
    "moe_layer_freq": 1,
    "moe_router_topk": 1,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "seed": 1234,
    "vocab_size": 24,
    "padded_vocab_size": 24,
    "seq_length": 16,
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "absent.model",
}


def make_args(**values: Any) -> argparse.Namespace:
    """Return the arguments of a run.

    Args:
        values: What differs from `VALUES` and from the defaults of the MoRE group.
    """
    flags = get_system(values.get("more_variant", VALUES["more_variant"])).flags(argparse.Namespace())
    return argparse.Namespace(**{**dataclasses.asdict(flags), **VALUES, **values})


def write_source(folder: Path, config: dict[str, Any], args: argparse.Namespace) -> None:
    """Write a checkpoint of random weights, without training."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    parameters = [(entry, torch.float32) for entry in entries(config)]
    write_release(folder, config, args, parameters, lambda entry: torch.randn(entry.shape, generator=generator))
