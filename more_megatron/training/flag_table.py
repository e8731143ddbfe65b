"""The table of what flags may be, Megatron's included: ranges of numbers, and rules between flags.

It holds what Megatron accepts wrongly, late or without a word. A rule of one system belongs to the system.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from more_megatron.flags import flag
from more_megatron.platform.packages import has_package, imports

__all__ = ["NEEDS", "RANGES", "RULES"]

# Interval, and the flags whose numbers must lie in it: the first row that names a flag counts. No number of a flag may
# be infinite or none.
RANGES = (
    ("(-inf, inf)", r"null_tokenizer_\w+_id|glu_linear_offset|async_ckpt_\w+_priority|mup_attn_scale_power|mscale\w*"),
    ("[-1, inf)", r"window_size"),
    ("[1, 10000]", r"num_layers|num_attention_heads|num_query_groups"),
    ("[1, 1000000]", r"num_experts|moe_router_topk"),
    ("[0, 1000]", r"num_workers"),
    ("[0, 65535]", r"\w+_port"),
    ("[1, 1000]", r"num_dataset_builder_threads|dist_ckpt_workers"),
    ("[1, 1000000000]", r"train_iters|eval_interval|(\w+_)?(seq_length|batch_size)"),
    # Megatron adds to it by rank; NumPy takes 32 bits.
    ("[1, 4000000000]", r"seed"),
    ("[0, 1)", r"\w+_dropout|(adam|lion)_beta[12]|\w+_momentum|\w+_ema|lr_warmup_fraction"),
    ("[0, 1]", r"\w*offload_fraction|moe_input_jitter_eps|logits_save_top_p|fim_\w+"),
    ("(0, 1]", r"rotary_percent|sample_rate"),
    ("(0, inf)", r"(adam_|layernorm_)eps(ilon)?|moe_expert\w*_capacity_factor|\w*loss_scale|loss_scale_window"),
    ("(0, inf)", r"rotary_base|\w+_scaling_factor|mup_(width|embedding|output)_mult|inprocess_\w+_(interval|timeout)"),
    ("[0, inf)", r"\w+_freq|(manual_gc|health)_interval|moe_shared_expert_intermediate_size"),
    ("[0, inf)", r"delta_offload\w+|min_offloaded\w+"),
    ("[1, inf)", r"\w+_(interval|size|multiple|divisible_by|instances|granularity|buckets|minutes|mins|jump)"),
    ("[1, inf)", r"hysteresis|kv_channels|train_samples|lr_(wsd_)?decay_\w+|recompute_num_layers|\w+_after_init"),
    ("[1, inf)", r"moe_router_(num_groups|group_topk)|\w+_interpolation_factor|max_position_embeddings|num_virtual\w+"),
    ("[1, inf)", r"\w*replication_factor|(de|en)coder_((first|last)_pipeline_)?num_layers|num_\w+_per_virtual\w+"),
    ("[0, inf)", r".*"),
)

# A flag, and the one that it needs, or several of which it needs one.
NEEDS = {
    "save": "save_interval",
    "valid_data_path": "train_data_path",
    "test_data_path": "train_data_path",
    "num_query_groups": "group_query_attention",
    "moe_router_num_groups": "moe_router_group_topk",
    "recompute_method": "recompute_granularity",
    "recompute_num_layers": "recompute_granularity",
    "rope_scaling_factor": "use_rope_scaling",
    "log_progress": "save",
    "use_pytorch_profiler": "tensorboard_dir",
    "ckpt_step": "load|pretrained_checkpoint",
    "finetune": "load|pretrained_checkpoint",
}

_FILE_TOKENIZERS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in re.split(r"[,/]", split)]
    except ValueError:
        return False
    return len(shares) <= 3 and all(0 <= share < math.inf for share in shares) and sum(shares) > 0


def _has_no_wsd(a: Namespace) -> bool:
    steps = a.lr_decay_iters or a.train_iters
    return a.lr_decay_style == "WSD" and steps and not 0 < (a.lr_wsd_decay_iters or 0) <= steps


def _has_odd_heads(a: Namespace) -> bool:
    turned = int((a.kv_channels or a.hidden_size // a.num_attention_heads) * a.rotary_percent)
    return a.position_embedding_type == "rope" and (turned == 0 or turned % 2 == 1)


def _has_odd_widths(a: Namespace) -> bool:
    parts = a.tensor_model_parallel_size
    experts = (a.moe_ffn_hidden_size or 0) % (a.expert_tensor_parallel_size or parts)
    return bool((a.ffn_hidden_size or 0) % parts or (a.moe_shared_expert_intermediate_size or 0) % parts or experts)


def _has_content(path: str) -> bool:
    return Path(path).is_file() and Path(path).stat().st_size > 0


# What must not be, and what is said of it; {name} stands for a flag and its value.
RULES: tuple[tuple[Callable[..., object], str], ...] = (
    *(
        (lambda a, name=name: getattr(a, name) is None, f"{flag(name)} is missing: give it a value")
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")
    ),
    (lambda a: a.tokenizer_type is None, "--tokenizer-type is missing: give it as in preprocessing"),
    (lambda a: a.skip_train and a.eval_iters == 0, "--skip-train with {eval_iters} does nothing: raise it"),
    (lambda a: not (a.train_iters or a.train_samples), "--train-iters is missing: give it, or --train-samples"),
    (lambda a: a.train_iters and a.train_samples, "{train_iters} and {train_samples} exclude each other"),
    (lambda a: a.lr is None and not a.skip_train, "--lr is missing: give it a value"),
    (lambda a: (a.lr_warmup_init or 0) > (a.lr or math.inf), "{lr_warmup_init} is above {lr}: lower it"),
    (lambda a: (a.decoupled_min_lr or 0) > (a.decoupled_lr or math.inf), "{decoupled_min_lr} is above {decoupled_lr}"),
    (lambda a: a.exit_signal.name in ("SIGKILL", "SIGSTOP"), "--exit-signal SIGKILL cannot be handled: name another"),
    (_has_no_wsd, "--lr-decay-style WSD needs --lr-wsd-decay-iters, at most --lr-decay-iters or --train-iters"),
    # Shapes
    (_has_odd_heads, "rotary positions need heads of an even width: change --kv-channels or {rotary_percent}"),
    (
        lambda a: a.group_query_attention and a.num_attention_heads % (a.num_query_groups or 1),
        "{num_attention_heads} is not divisible by {num_query_groups}",
    ),
    (
        lambda a: a.seq_length % (a.tensor_model_parallel_size * a.context_parallel_size),
        "{seq_length} is not divisible by {tensor_model_parallel_size} x {context_parallel_size}, which split it",
    ),
    (_has_odd_widths, "{tensor_model_parallel_size} must divide --ffn-hidden-size and its kin: change one"),
    (
        lambda a: a.reset_attention_mask and a.pipeline_model_parallel_size > 1,
        "--reset-attention-mask needs --pipeline-model-parallel-size 1: middle pipeline stages do not receive the mask",
    ),
    # Experts
    (
        lambda a: a.moe_shared_expert_gate and a.moe_shared_expert_intermediate_size == 0,
        "--moe-shared-expert-gate, but {moe_shared_expert_intermediate_size} means no shared expert: drop one of them",
    ),
    (lambda a: a.num_experts and a.moe_router_topk > a.num_experts, "{moe_router_topk} is above {num_experts}"),
    (lambda a: a.router_min_entropy > math.log(a.num_experts or 1), "{router_min_entropy} is above ln --num-experts"),
    (
        lambda a: a.num_experts and a.add_bias_linear and a.transformer_impl == "local",
        "--enable-bias-linear needs --transformer-impl transformer_engine: local experts have no biases",
    ),
    (
        lambda a: a.moe_layer_freq == 0 or (isinstance(a.moe_layer_freq, list) and {*a.moe_layer_freq} - {0, 1}),
        "{moe_layer_freq} must be at least 1, or a list as in '[0,1,1,1]', which says which layers have experts",
    ),
    (
        lambda a: np.size(a.moe_aux_loss_coeff) > np.size(a.moe_router_load_balancing_type),
        "{moe_aux_loss_coeff} has more numbers than there are values of {moe_router_load_balancing_type}",
    ),
    (lambda a: a.window_size and len(a.window_size) != 2, "{window_size} must be two numbers, as in 128,0"),
    # Schedule and data
    (
        lambda a: (a.lr_warmup_iters or 0) >= (a.lr_decay_iters or a.train_iters or math.inf),
        "{lr_warmup_iters} must be below --lr-decay-iters, by default --train-iters: lower it",
    ),
    (lambda a: a.split is not None and not _is_split(a.split), "{split} must be up to three shares, as in 90,5,5"),
    (
        lambda a: [] in (a.data_path, a.train_data_path, a.valid_data_path, a.test_data_path),
        "a flag of data is empty: give --data-path or --train-data-path prefixes, weights before them for a blend",
    ),
    (
        lambda a: sum(map(bool, (a.data_path, a.data_args_path, a.train_data_path, a.mock_data))) > 1,
        "the data are named twice: give one of --data-path, --data-args-path, --train-data-path and --mock-data",
    ),
    (lambda a: a.train_data_path and a.split is not None, "{split} divides --data-path: leave it out"),
    (lambda a: len(a.spec or (0, 0)) != 2, "{spec} must be two words: a module, and what it holds"),
    (lambda a: a.dataloader_type == "external", "{dataloader_type} is not supported: leave it out"),
    (lambda a: a.wandb_project and not (a.wandb_save_dir or a.save), "{wandb_project} needs --wandb-save-dir"),
    # What this machine lacks
    (
        lambda a: a.transformer_impl == "transformer_engine" and not imports("transformer_engine.pytorch"),
        "--transformer-impl transformer_engine, but Transformer Engine is not installed, or not for this PyTorch: "
        "install the extra `te` or give --transformer-impl local",
    ),
    (
        lambda a: a.transformer_impl == "local" and a.attention_backend.name in ("flash", "fused"),
        "--attention-backend flash and fused need --transformer-impl transformer_engine: local layers know neither",
    ),
    (
        lambda a: a.profile and not (a.use_pytorch_profiler or torch.cuda.is_available()),
        "--profile needs a GPU, or --use-pytorch-profiler",
    ),
    (
        lambda a: a.inprocess_restart and not has_package("nvidia_resiliency_ext"),
        "--inprocess-restart needs nvidia_resiliency_ext",
    ),
    *(
        (
            lambda a, name=name: getattr(a, name) is not None and a.transformer_impl == "local",
            f"--{name}-format needs --transformer-impl transformer_engine: local layers compute in bf16",
        )
        for name in ("fp8", "fp4")
    ),
    (
        lambda a: a.optimizer == "sgd" and a.use_distributed_optimizer,
        "{optimizer} needs --no-use-distributed-optimizer",
    ),
    (lambda a: a.async_save and a.ckpt_format == "torch", "--async-save needs --ckpt-format torch_dist"),
    # Files
    (
        lambda a: "Null" in a.tokenizer_type and not a.vocab_size,
        "{tokenizer_type} needs --vocab-size, the number of its ids",
    ),
    (
        lambda a: a.tokenizer_type in _FILE_TOKENIZERS and not _has_content(a.tokenizer_model or ""),
        "{tokenizer_type} needs --tokenizer-model, the path of its file: {tokenizer_model} does not exist, or is empty",
    ),
    *(
        (
            lambda a, name=name: getattr(a, name) is not None and not _has_content(getattr(a, name)),
            f"{{{name}}} does not exist, or is empty: name a file",
        )
        for name in ("vocab_file", "merge_file", "per_dataset_sequences_path", "tp_comm_overlap_cfg")
    ),
    *(
        (lambda a, name=name: getattr(a, name), f"{flag(name)} is not supported: leave it out")
        for name in (
            *("multi_latent_attention", "experimental_attention_variant", "heterogeneous_layers_config_path"),
            *("heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern", "fim_data", "adlr_autoresume"),
            *("init_method_xavier_uniform", "init_model_with_meta_device"),
        )
    ),
)
