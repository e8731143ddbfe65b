"""Checks of flags that Megatron makes late, deep inside a run, or with an assertion that says little."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from more_megatron.errors import MoREError
from more_megatron.platform import Platform, select_platform
from more_megatron.platform.packages import has_package, imports
from more_megatron.systems import get_system
from more_megatron.training.options import option_faults

__all__ = ["check_flags"]

_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "vocab_size",
    "num_experts",
    "moe_router_topk",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "log_interval",
    "save_interval",
    "eval_interval",
)

# Tokenizer types that are read from a file on this machine.
_FILE_TOKENIZERS = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)


def check_flags(args: argparse.Namespace) -> None:
    """Check parsed flags, before Megatron does.

    Args:
        args: Megatron's namespace, parsed and not yet validated.

    Raises:
        MoREError: If a flag is wrong; the message names it and says how to mend it.
    """
    get_system(args.more_variant)
    if args.use_checkpoint_args:
        raise MoREError("--use-checkpoint-args needs a checkpoint in --load: leave it out, or name another folder")
    if args.yaml_cfg is not None:  # The flags are not all there yet.
        return
    for check in (_positive, _required, _shapes, _experts, _layout, _backend, _files, _unsupported, option_faults):
        for fault in check(args):
            raise MoREError(fault)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(args: argparse.Namespace) -> Iterator[str]:
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and value < 1:
            yield f"{_option(name)} {value} must be at least 1"


def _required(args: argparse.Namespace) -> Iterator[str]:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            yield f"{_option(name)} is missing: give it a value"
    if args.train_iters is None and args.train_samples is None and not args.skip_train:
        yield "the length of training is missing: give --train-iters or --train-samples"
    if args.lr is None and not args.skip_train:
        yield "--lr is missing: give it a value"
    if args.save is not None and args.save_interval is None:
        yield "--save needs --save-interval: give it a number of iterations"


def _shapes(args: argparse.Namespace) -> Iterator[str]:
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    if args.kv_channels is None and args.hidden_size % heads != 0:
        yield (
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {heads}: "
            "change one of them or give --kv-channels"
        )
    if heads % tensor != 0:
        yield f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {tensor}"
    if args.group_query_attention and heads % (args.num_query_groups or 1) != 0:
        yield f"--num-attention-heads {heads} is not divisible by --num-query-groups {args.num_query_groups}"
    parts = tensor * args.context_parallel_size
    if args.seq_length % parts != 0:
        yield (
            f"--seq-length {args.seq_length} is not divisible by {parts}, the tensor-parallel size times the "
            "context-parallel size, between which sequences are split"
        )
    if (args.max_position_embeddings or args.seq_length) < args.seq_length:
        yield f"--max-position-embeddings {args.max_position_embeddings} is below --seq-length {args.seq_length}"


def _experts(args: argparse.Namespace) -> Iterator[str]:
    experts, ranks = args.num_experts, args.expert_model_parallel_size
    if experts is None:
        return
    if experts % ranks != 0:
        yield f"--num-experts {experts} is not divisible by --expert-model-parallel-size {ranks}: change one of them"
    if args.moe_router_topk > experts:
        yield f"--moe-router-topk {args.moe_router_topk} is above --num-experts {experts}: lower it"
    if args.add_bias_linear and args.moe_shared_expert_intermediate_size != 0:
        yield "shared experts have no biases: leave --enable-bias-linear out"
    if args.add_bias_linear and args.transformer_impl == "local":
        yield "--enable-bias-linear needs --transformer-impl transformer_engine: local experts have no biases"
    if "sinkhorn" in args.moe_router_load_balancing_type and args.moe_aux_loss_coeff:
        yield "--moe-router-load-balancing-type sinkhorn has no balance loss: give --moe-aux-loss-coeff 0"


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


def _backend(args: argparse.Namespace) -> Iterator[str]:
    if args.transformer_impl == "transformer_engine" and not imports("transformer_engine.pytorch"):
        yield (
            "--transformer-impl transformer_engine, but Transformer Engine is not installed, or not for this PyTorch: "
            "install the extra `te` or give --transformer-impl local"
        )
    for flag, value in (("--fp8-format", args.fp8), ("--fp4-format", args.fp4)):
        if value is not None and args.transformer_impl == "local":
            yield f"{flag} needs --transformer-impl transformer_engine: local layers compute in bf16"
    if args.distributed_backend == "nccl" and select_platform() is Platform.CPU:
        yield "--distributed-backend nccl needs a GPU: leave it out"
    if args.cuda_graph_impl != "none" and select_platform() is Platform.CPU:
        yield f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU: leave it out"
    if args.optimizer not in ("adam", "sgd") and not has_package("emerging_optimizers"):
        yield f"--optimizer {args.optimizer} needs the package emerging-optimizers: install it or give --optimizer adam"
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        yield "--optimizer sgd cannot be distributed: give --no-use-distributed-optimizer as well"
    if args.transformer_impl == "local" and args.context_parallel_size > 1:
        yield "--context-parallel-size above 1 needs --transformer-impl transformer_engine: leave it out"


def _files(args: argparse.Namespace) -> Iterator[str]:
    if args.tokenizer_type is None:
        yield "--tokenizer-type is missing: give it and --tokenizer-model as in preprocessing"
    if args.tokenizer_type in _FILE_TOKENIZERS:
        if args.tokenizer_model is None:
            yield f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model: give the path of its file"
        elif not Path(args.tokenizer_model).is_file():
            yield f"--tokenizer-model {args.tokenizer_model} does not exist: give the path of the tokenizer's file"


def _unsupported(args: argparse.Namespace) -> Iterator[str]:
    for name in (
        "multi_latent_attention",
        "heterogeneous_layers_config_path",
        "hybrid_layer_pattern",
        "sft",
        "fim_data",
    ):
        if getattr(args, name):
            yield f"{_option(name)} is not supported: leave it out"
