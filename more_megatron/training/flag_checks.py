"""What flags may be: one table of ranges and one of rules, for what Megatron accepts wrongly, late or without a word.

A rule of one system belongs to the system. What is not in a table is Megatron's to refuse, in one line as well.
"""

from __future__ import annotations

import argparse
import enum
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

from more_megatron.errors import MoREError
from more_megatron.flags import flag
from more_megatron.platform import Platform, select_platform
from more_megatron.platform.packages import has_package, imports
from more_megatron.systems import flag_names, get_system

__all__ = ["RANGES", "check_flags", "convert"]

_LARGEST_SEED = 2**32 - 2**20

# Interval, and the numbers that must lie in it; the first row that names a flag counts. The last row is for all others:
# no flag of Megatron's means anything by a number that is not finite.
RANGES = (
    ("(-inf, inf)", r"null_tokenizer_\w+_id|glu_linear_offset|async_ckpt_\w+_priority|mup_attn_scale_power|mscale\w*"),
    ("[1, 10000]", r"num_layers|num_attention_heads|num_query_groups"),
    ("[1, 1000000]", r"num_experts|moe_router_topk"),
    ("[0, 1000]", r"num_workers"),
    ("[1, 1000]", r"num_dataset_builder_threads|dist_ckpt_workers"),
    ("[1, 1000000000]", r"train_iters|eval_interval|(\w+_)?(seq_length|batch_size)"),
    (f"[0, {_LARGEST_SEED}]", r"seed"),
    ("[0, 1)", r"\w+_dropout|(adam|lion)_beta[12]|\w+_momentum|\w+_ema|lr_warmup_fraction"),
    ("[0, 1]", r"\w*offload_fraction|moe_input_jitter_eps|logits_save_top_p|fim_\w+"),
    ("(0, 1]", r"rotary_percent|sample_rate"),
    (
        "(0, inf)",
        r"(adam_|layernorm_)eps(ilon)?|moe_expert\w*_capacity_factor|(initial_|min_)?loss_scale|rotary_base|\w+_scaling_factor"
        r"|mup_(width|embedding|output)_mult|loss_scale_window|inprocess_\w+_(interval|timeout)",
    ),
    (
        "[0, inf)",
        r"manual_gc_interval|\w+_dsa_\w+|moe_shared_expert_intermediate_size|delta_offload\w+|min_offloaded\w+",
    ),
    (
        "[1, inf)",
        r"\w+_interval|\w*_size|\w+_(freq|multiple|divisible_by|instances|granularity|buckets|minutes|mins|jump|factor)|hysteresis"
        r"|kv_channels|train_samples|recompute_num_layers|\w+_pipeline_num_layers|num_\w+_per_virtual\w+|num_virtual\w+"
        r"|moe_router_(num_groups|group_topk)|max_position_embeddings|\w+_(encoder|decoder)_num_layers|\w+_after_init",
    ),
    ("[0, inf)", r".*"),
)

# Tokenizer types that are read from a file on this machine.
_FILE_TOKENIZERS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")


def _heads_width(a: argparse.Namespace) -> int:
    return int((a.kv_channels or a.hidden_size // a.num_attention_heads) * a.rotary_percent)


def _has(name: str) -> Callable[[argparse.Namespace], object]:
    return lambda a: getattr(a, name)


def _lacks(name: str) -> Callable[[argparse.Namespace], object]:
    return lambda a: getattr(a, name) is None


def _names_no_file(name: str) -> Callable[[argparse.Namespace], object]:
    return lambda a: getattr(a, name) is not None and not Path(getattr(a, name)).is_file()


def _is_local_with(name: str) -> Callable[[argparse.Namespace], object]:
    return lambda a: getattr(a, name) is not None and a.transformer_impl == "local"


# What must not be, and what is said of it; {name} is a flag with its value.
_Rule = tuple[Callable[[argparse.Namespace], object], str]
_REQUIRED: tuple[_Rule, ...] = (
    *(
        (_lacks(name), f"{flag(name)} is missing: give it a value")
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")
    ),
    (
        lambda a: a.train_iters is None and a.train_samples is None,
        "the length of training is missing: give --train-iters or --train-samples",
    ),
    (lambda a: a.lr is None and not a.skip_train, "--lr is missing: give it a value"),
    (lambda a: a.save and not a.save_interval, "--save needs --save-interval: give it a number of iterations"),
    (
        lambda a: a.tokenizer_type is None,
        "--tokenizer-type is missing: give it and --tokenizer-model as in preprocessing",
    ),
)
_SHAPES: tuple[_Rule, ...] = (
    (
        lambda a: a.kv_channels is None and a.hidden_size % a.num_attention_heads,
        "{hidden_size} is not divisible by {num_attention_heads}: change one of them or give --kv-channels",
    ),
    (
        lambda a: a.position_embedding_type == "rope" and (_heads_width(a) % 2 or _heads_width(a) == 0),
        "rotary positions need heads of an even width: change --hidden-size, --kv-channels or {rotary_percent}",
    ),
    (
        lambda a: a.num_attention_heads % a.tensor_model_parallel_size,
        "{num_attention_heads} is not divisible by {tensor_model_parallel_size}",
    ),
    (
        lambda a: a.group_query_attention and a.num_attention_heads % (a.num_query_groups or 1),
        "{num_attention_heads} is not divisible by {num_query_groups}",
    ),
    (
        lambda a: a.seq_length % (a.tensor_model_parallel_size * a.context_parallel_size),
        "{seq_length} is not divisible by the product of {tensor_model_parallel_size} and {context_parallel_size}, "
        "between which sequences are split",
    ),
    (
        lambda a: (a.max_position_embeddings or a.seq_length) < a.seq_length,
        "{max_position_embeddings} is below {seq_length}",
    ),
    (
        lambda a: a.micro_batch_size > (a.global_batch_size or a.micro_batch_size),
        "{micro_batch_size} is above {global_batch_size}",
    ),
)
_EXPERTS: tuple[_Rule, ...] = (
    (
        lambda a: a.num_experts % a.expert_model_parallel_size,
        "{num_experts} is not divisible by {expert_model_parallel_size}: change one of them",
    ),
    (lambda a: a.moe_router_topk > a.num_experts, "{moe_router_topk} is above {num_experts}: lower it"),
    (
        lambda a: a.add_bias_linear and a.moe_shared_expert_intermediate_size != 0,
        "shared experts have no biases: leave --enable-bias-linear out",
    ),
    (
        lambda a: a.add_bias_linear and a.transformer_impl == "local",
        "--enable-bias-linear needs --transformer-impl transformer_engine: local experts have no biases",
    ),
    (
        lambda a: "sinkhorn" in a.moe_router_load_balancing_type and a.moe_aux_loss_coeff,
        "--moe-router-load-balancing-type sinkhorn has no balance loss: give --moe-aux-loss-coeff 0",
    ),
    (
        lambda a: isinstance(a.moe_layer_freq, int) and a.moe_layer_freq < 1,
        "{moe_layer_freq} must be at least 1, or a list as in '[0,1,1,1]', which says which layers have experts",
    ),
)
_SCHEDULE: tuple[_Rule, ...] = (
    (
        lambda a: (a.lr_warmup_iters or 0) >= (a.lr_decay_iters or a.train_iters or math.inf),
        "{lr_warmup_iters} must be below --lr-decay-iters, by default --train-iters: lower it",
    ),
    (
        lambda a: (a.lr_warmup_samples or 0) >= (a.lr_decay_samples or a.train_samples or math.inf),
        "{lr_warmup_samples} must be below --lr-decay-samples, by default --train-samples: lower it",
    ),
    (lambda a: a.lr is not None and a.min_lr > a.lr, "{min_lr} is above {lr}: lower it"),
    (lambda a: a.lr is not None and a.lr_warmup_init > a.lr, "{lr_warmup_init} is above {lr}: lower it"),
    (
        lambda a: a.split is not None and not _is_split(a.split),
        "{split} must be up to three shares that are not negative and not all 0, as in --split 90,5,5",
    ),
)
_BACKEND: tuple[_Rule, ...] = (
    (
        lambda a: a.transformer_impl == "transformer_engine" and not imports("transformer_engine.pytorch"),
        "--transformer-impl transformer_engine, but Transformer Engine is not installed, or not for this PyTorch: "
        "install the extra `te` or give --transformer-impl local",
    ),
    *(
        (
            _is_local_with(name),
            f"--{name}-format needs --transformer-impl transformer_engine: local layers compute in bf16",
        )
        for name in ("fp8", "fp4")
    ),
    (
        lambda a: a.distributed_backend == "nccl" and select_platform() is Platform.CPU,
        "{distributed_backend} needs a GPU: leave it out",
    ),
    (
        lambda a: a.cuda_graph_impl != "none" and select_platform() is Platform.CPU,
        "{cuda_graph_impl} needs a GPU: leave it out",
    ),
    (
        lambda a: a.optimizer not in ("adam", "sgd") and not has_package("emerging_optimizers"),
        "{optimizer} needs the package emerging-optimizers: install it or give --optimizer adam",
    ),
    (
        lambda a: a.optimizer == "sgd" and a.use_distributed_optimizer,
        "--optimizer sgd cannot be distributed: give --no-use-distributed-optimizer as well",
    ),
    (
        lambda a: a.transformer_impl == "local" and a.context_parallel_size > 1,
        "--context-parallel-size above 1 needs --transformer-impl transformer_engine: leave it out",
    ),
    (
        lambda a: a.async_save and a.ckpt_format not in ("torch_dist", "torch_dcp", "fsdp_dtensor"),
        "--async-save needs --ckpt-format torch_dist: leave {ckpt_format} out",
    ),
)
_FILES: tuple[_Rule, ...] = (
    (
        lambda a: a.tokenizer_type in _FILE_TOKENIZERS and a.tokenizer_model is None,
        "{tokenizer_type} needs --tokenizer-model: give the path of its file",
    ),
    (
        lambda a: a.tokenizer_type in _FILE_TOKENIZERS and not Path(a.tokenizer_model).is_file(),
        "{tokenizer_model} does not exist: give the path of the tokenizer's file",
    ),
    (
        lambda a: a.tokenizer_type in _FILE_TOKENIZERS and Path(a.tokenizer_model).stat().st_size == 0,
        "{tokenizer_model} is empty: give the path of the tokenizer's file",
    ),
    *(
        (_names_no_file(name), f"{{{name}}} does not exist: name a file")
        for name in ("vocab_file", "merge_file", "per_dataset_sequences_path", "tp_comm_overlap_cfg")
    ),
)
_UNSUPPORTED: tuple[_Rule, ...] = tuple(
    (_has(name), f"{flag(name)} is not supported: leave it out")
    for name in (
        "multi_latent_attention",
        "heterogeneous_layers_config_path",
        "hybrid_layer_pattern",
        "sft",
        "fim_data",
    )
)


def check_flags(args: argparse.Namespace, given: Set[str]) -> None:
    """Check parsed flags, before Megatron does.

    Args:
        args: Megatron's namespace, parsed and not yet validated.
        given: Names of the arguments that the command line sets.

    Raises:
        MoREError: If a flag is wrong; the message names it and says how to mend it.
    """
    get_system(args.more_variant)
    if args.use_checkpoint_args:
        raise MoREError("--use-checkpoint-args needs a checkpoint in --load: leave it out, or name another folder")
    if {"bf16", "fp16"} <= given and args.bf16:
        raise MoREError("--bf16 and --fp16 exclude each other: leave one out")
    if args.yaml_cfg is not None:  # The flags are not all there yet.
        return
    for fault in _out_of_range(args, given):
        raise MoREError(fault)
    experts = _EXPERTS if args.num_experts is not None else ()
    for broken, text in (*_REQUIRED, *_SHAPES, *experts, *_SCHEDULE, *_BACKEND, *_FILES, *_UNSUPPORTED):
        if broken(args):
            raise MoREError(re.sub(r"\{(\w+)\}", lambda m: f"{flag(m[1])} {getattr(args, m[1])}", text))
    for fault in _layout(args):
        raise MoREError(fault)


def convert(convert_as_megatron: Callable[[str], object], choices: Iterable[enum.Enum], text: str) -> object:
    """Convert the text of a flag as Megatron does, by evaluation or a member's name, or refuse it in the parser's way.

    Args:
        convert_as_megatron: Megatron's type of the flag.
        choices: Members that may be named, if any.
        text: What the command line says.

    Raises:
        ArgumentTypeError: If it is nothing of the kind.
    """
    try:
        return convert_as_megatron(text)
    except Exception as error:
        names = ", ".join(choice.name for choice in choices)
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}{names and f' (choose from {names})'}") from error


def _out_of_range(args: argparse.Namespace, given: Set[str]) -> Iterator[str]:
    for name in sorted(given - flag_names()):
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                interval = next(interval for interval, names in RANGES if re.fullmatch(names, name))
                if not _lies_in(number, interval):
                    yield f"{flag(name)} {number} must be {_in_words(interval)}"


def _bounds(interval: str) -> tuple[str, float, float, str]:
    low, high = interval[1:-1].split(", ")
    return interval[0], float(low), float(high), interval[-1]


def _lies_in(number: float, interval: str) -> bool:
    opening, low, high, closing = _bounds(interval)
    above = number >= low if opening == "[" else number > low
    return math.isfinite(number) and above and (number <= high if closing == "]" else number < high)


def _in_words(interval: str) -> str:
    opening, low, high, closing = _bounds(interval)
    bounds = [
        f"{word} {bound:.0f}"
        for word, bound in (
            ("at least" if opening == "[" else "above", low),
            ("at most" if closing == "]" else "below", high),
        )
        if math.isfinite(bound)
    ]
    return " and ".join(bounds) + ("" if math.isfinite(high) else " and finite") if bounds else "finite"


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in re.split(r"[,/]", split)]
    except ValueError:
        return False
    return len(shares) <= 3 and all(0 <= share < math.inf for share in shares) and sum(shares) > 0


def _layout(args: argparse.Namespace) -> Iterator[str]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    pipeline = args.pipeline_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    for flags, size in (
        (
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size",
            args.tensor_model_parallel_size * pipeline * args.context_parallel_size,
        ),
        (
            "--expert-tensor-parallel-size (default: the tensor-parallel size) x --expert-model-parallel-size x "
            "--pipeline-model-parallel-size",
            expert_tensor * args.expert_model_parallel_size * pipeline,
        ),
    ):
        if world % size != 0:
            yield f"the number of ranks, {world}, is not divisible by {size} = {flags}: change the ranks or the layout"
    if args.reset_attention_mask and pipeline > 1:
        yield (
            "--reset-attention-mask needs --pipeline-model-parallel-size 1: "
            "middle pipeline stages do not receive the mask"
        )
