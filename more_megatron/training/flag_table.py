"""The table of what flags may be, Megatron's included: ranges of numbers, and rules between flags.

It holds what Megatron accepts wrongly, late or without a word. A rule of one system belongs to the system.
"""

import math
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from more_megatron.flags import flag
from more_megatron.platform.packages import has_package, imports
from more_megatron.training.row_length import length_curriculum

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
    ("[0, inf)", r"(manual_gc|health)_interval|moe_shared_expert_intermediate_size|(delta_offload|min_offloaded)\w+"),
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


def broken_rules(a: Namespace) -> Iterator[str]:
    """Yield what is wrong between parsed flags; `{name}` is a flag and its value.

    Only the first is said, so that a rule may count on those before it to hold.
    """
    for rules in (_basics, _schedule, _shapes, _experts, _data, _machine, _files, row_faults):
        yield from rules(a)


def _basics(a: Namespace) -> Iterator[str]:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        if getattr(a, name) is None:
            yield f"{flag(name)} is missing: give it a value"
    if a.tokenizer_type is None:
        yield "--tokenizer-type is missing: give it as in preprocessing"
    if a.skip_train and a.eval_iters == 0:
        yield "--skip-train with {eval_iters} does nothing: raise it"
    if not (a.train_iters or a.train_samples):
        yield "--train-iters is missing: give it, or --train-samples"
    if a.lr is None and not a.skip_train:
        yield "--lr is missing: give it a value"
    for name in (
        *("multi_latent_attention", "experimental_attention_variant", "heterogeneous_layers_config_path"),
        *("heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern", "fim_data", "adlr_autoresume"),
        *("init_method_xavier_uniform", "init_model_with_meta_device"),
    ):
        if getattr(a, name):
            yield f"{flag(name)} is not supported: leave it out"


def _schedule(a: Namespace) -> Iterator[str]:
    steps = a.lr_decay_iters or a.train_iters
    if a.train_iters and a.train_samples:
        yield "{train_iters} and {train_samples} exclude each other"
    if (a.lr_warmup_init or 0) > (a.lr or math.inf):
        yield "{lr_warmup_init} is above {lr}: lower it"
    if (a.decoupled_min_lr or 0) > (a.decoupled_lr or math.inf):
        yield "{decoupled_min_lr} is above {decoupled_lr}"
    if a.exit_signal.name in ("SIGKILL", "SIGSTOP"):
        yield "--exit-signal SIGKILL cannot be handled: name another"
    if a.lr_decay_style == "WSD" and steps and not 0 < (a.lr_wsd_decay_iters or 0) <= steps:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters, at most --lr-decay-iters or --train-iters"
    if (a.lr_warmup_iters or 0) >= (steps or math.inf):
        yield "{lr_warmup_iters} must be below --lr-decay-iters, by default --train-iters: lower it"
    if a.optimizer == "sgd" and a.use_distributed_optimizer:
        yield "{optimizer} needs --no-use-distributed-optimizer"


def _shapes(a: Namespace) -> Iterator[str]:
    turned = int((a.kv_channels or a.hidden_size // a.num_attention_heads) * a.rotary_percent)
    if a.position_embedding_type == "rope" and (turned == 0 or turned % 2 == 1):
        yield "rotary positions need heads of an even width: change --kv-channels or {rotary_percent}"
    if a.group_query_attention and a.num_attention_heads % (a.num_query_groups or 1):
        yield "{num_attention_heads} is not divisible by {num_query_groups}"
    parts = a.tensor_model_parallel_size
    if a.seq_length % (parts * a.context_parallel_size):
        yield "{seq_length} is not divisible by {tensor_model_parallel_size} x {context_parallel_size}, which split it"
    of_experts = (a.moe_ffn_hidden_size or 0) % (a.expert_tensor_parallel_size or parts)
    if (a.ffn_hidden_size or 0) % parts or (a.moe_shared_expert_intermediate_size or 0) % parts or of_experts:
        yield "{tensor_model_parallel_size} must divide --ffn-hidden-size and its kin: change one"
    if a.reset_attention_mask and a.pipeline_model_parallel_size > 1:
        yield (
            "--reset-attention-mask needs --pipeline-model-parallel-size 1: "
            "middle pipeline stages do not receive the mask"
        )
    if a.window_size and len(a.window_size) != 2:
        yield "{window_size} must be two numbers, as in 128,0"


def _experts(a: Namespace) -> Iterator[str]:
    if a.moe_shared_expert_gate and a.moe_shared_expert_intermediate_size == 0:
        yield (
            "--moe-shared-expert-gate, but {moe_shared_expert_intermediate_size} means no shared expert: "
            "drop one of them"
        )
    if a.num_experts and a.moe_router_topk > a.num_experts:
        yield "{moe_router_topk} is above {num_experts}"
    if a.router_min_entropy > math.log(a.num_experts or 1):
        yield "{router_min_entropy} is above ln --num-experts"
    if a.num_experts and a.add_bias_linear and a.transformer_impl == "local":
        yield "--enable-bias-linear needs --transformer-impl transformer_engine: local experts have no biases"
    if a.moe_layer_freq == 0 or (isinstance(a.moe_layer_freq, list) and {*a.moe_layer_freq} - {0, 1}):
        yield "{moe_layer_freq} must be at least 1, or a list as in '[0,1,1,1]', which says which layers have experts"
    if np.size(a.moe_aux_loss_coeff) > np.size(a.moe_router_load_balancing_type):
        yield "{moe_aux_loss_coeff} has more numbers than there are values of {moe_router_load_balancing_type}"


def _data(a: Namespace) -> Iterator[str]:
    if a.split is not None and not _is_split(a.split):
        yield "{split} must be up to three shares, as in 90,5,5"
    if [] in (a.data_path, a.train_data_path, a.valid_data_path, a.test_data_path):
        yield "a flag of data is empty: give --data-path or --train-data-path prefixes, weights before them for a blend"
    if sum(map(bool, (a.data_path, a.data_args_path, a.train_data_path, a.mock_data))) > 1:
        yield "the data are named twice: give one of --data-path, --data-args-path, --train-data-path and --mock-data"
    if a.train_data_path and a.split is not None:
        yield "{split} divides --data-path: leave it out"
    if a.dataloader_type == "external":
        yield "{dataloader_type} is not supported: leave it out"


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in re.split(r"[,/]", split)]
    except ValueError:
        return False
    return len(shares) <= 3 and all(0 <= share < math.inf for share in shares) and sum(shares) > 0


def row_faults(a: Namespace) -> Iterator[str]:
    """Yield what is wrong with flags that divide rows: into problems, or into shorter rows."""
    curriculum = length_curriculum(a)
    for length in [] if curriculum is None else curriculum.values:
        if a.seq_length % length != 0 or length % a.tensor_model_parallel_size != 0:
            yield (
                f"--seq-length-curriculum has rows of {length} tokens: their length must divide --seq-length "
                f"{a.seq_length} and be divisible by --tensor-model-parallel-size {a.tensor_model_parallel_size}"
            )
    if not (a.loss_on_answers or curriculum):
        return
    given = "--loss-on-answers" if a.loss_on_answers else "--seq-length-curriculum"
    others = {
        "--context-parallel-size": a.context_parallel_size > 1,
        "--reset-position-ids": a.reset_position_ids,
        "--reset-attention-mask": a.reset_attention_mask,
        "--dataloader-inter-document-masking": a.dataloader_inter_document_masking,
        "--mtp-num-layers": a.mtp_num_layers,
        "--mock-data": a.loss_on_answers and a.mock_data,
        "--seq-length-curriculum": a.loss_on_answers and curriculum,
    }
    for other, is_given in others.items():
        if is_given:
            yield f"{given} divides rows by itself and does not go together with {other}: leave one of them out"


def _machine(a: Namespace) -> Iterator[str]:
    """Yield what this machine, or layers in plain PyTorch, lack."""
    if a.transformer_impl == "transformer_engine" and not imports("transformer_engine.pytorch"):
        yield (
            "--transformer-impl transformer_engine, but Transformer Engine is not installed, or not for this PyTorch: "
            "install the extra `te` or give --transformer-impl local"
        )
    if a.transformer_impl == "local" and a.attention_backend.name in ("flash", "fused"):
        yield (
            "--attention-backend flash and fused need --transformer-impl transformer_engine: local layers know neither"
        )
    if a.profile and not (a.use_pytorch_profiler or torch.cuda.is_available()):
        yield "--profile needs a GPU, or --use-pytorch-profiler"
    if a.inprocess_restart and not has_package("nvidia_resiliency_ext"):
        yield "--inprocess-restart needs nvidia_resiliency_ext"
    for name in ("fp8", "fp4"):
        if getattr(a, name) is not None and a.transformer_impl == "local":
            yield f"--{name}-format needs --transformer-impl transformer_engine: local layers compute in bf16"


def _files(a: Namespace) -> Iterator[str]:
    if len(a.spec or (0, 0)) != 2:
        yield "{spec} must be two words: a module, and what it holds"
    if a.wandb_project and not (a.wandb_save_dir or a.save):
        yield "{wandb_project} needs --wandb-save-dir"
    if a.async_save and a.ckpt_format == "torch":
        yield "--async-save needs --ckpt-format torch_dist"
    if "Null" in a.tokenizer_type and not a.vocab_size:
        yield "{tokenizer_type} needs --vocab-size, the number of its ids"
    if a.tokenizer_type in _FILE_TOKENIZERS and not _has_content(a.tokenizer_model or ""):
        yield (
            "{tokenizer_type} needs --tokenizer-model, the path of its file: "
            "{tokenizer_model} does not exist, or is empty"
        )
    for name in ("vocab_file", "merge_file", "per_dataset_sequences_path", "tp_comm_overlap_cfg"):
        if getattr(a, name) is not None and not _has_content(getattr(a, name)):
            yield f"{{{name}}} does not exist, or is empty: name a file"


def _has_content(path: str) -> bool:
    return Path(path).is_file() and Path(path).stat().st_size > 0
