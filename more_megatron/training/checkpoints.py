"""Checkpoints checked before any rank loads one."""

import argparse
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from megatron.training import get_tokenizer

from more_megatron.checkpoint_files import check_content, check_files, repair_tracker
from more_megatron.config import MoREConfig
from more_megatron.console import say
from more_megatron.errors import MoREError
from more_megatron.flags import flag
from more_megatron.systems import flag_names, get_system
from more_megatron.training.data_checks import tokenizer_hash
from more_megatron.training.stored_flags import checkpoint_source, stored_arguments

# Arguments that decide which tensors a model has, and of which shape.
_ARCHITECTURE: tuple[str, ...] = (
    *("more_variant", "num_layers", "hidden_size", "num_attention_heads", "kv_channels", "group_query_attention"),
    *("num_query_groups", "ffn_hidden_size", "num_experts", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_layer_freq", "recurrence_ffn_hidden_size", "normalization"),
    *("position_embedding_type", "swiglu", "add_bias_linear", "qk_layernorm", "moe_router_enable_expert_bias"),
    *("untie_embeddings_and_output_weights", "vocab_size"),
)
# Fields of Megatron's configuration that say how something is computed, not what.
_HOW = re.compile(
    r"backend|capacity_factor_c|checkpoint|comm|cuda_graph|deepep|dispatcher|fusi|fuse|gemm|hybridep|impl|inference|log"
    r"|ncclep|num_query_groups|offload|overlap|pad_|padding|parallel|pipeline|quantizer|recompute|saved_act|stash|test_mode"
)
_ALSO_WHAT = ("seed", "seq_length", "rotary_base", "rotary_percent")


def check_checkpoint(args: argparse.Namespace) -> None:
    """Check the checkpoint that `--load` names, or else `--pretrained-checkpoint`, if there is one.

    Rank 0 checks that all of it is there and that it is of this run. Each rank checks the content of some files. A
    tracker file that a kill left empty or unwritten is mended. The arguments get the tokenizer's hash and size, which
    checkpoints hold from now on.

    Raises:
        MoREError: If the checkpoint is damaged or incomplete, or is one of another architecture or tokenizer; or if
            there is none and `--load` is not where the run saves.
    """
    args.tokenizer_sha256 = tokenizer_hash(args)
    args.tokenizer_vocab_size = get_tokenizer().vocab_size
    if args.ckpt_format != "torch_dist":
        return
    if args.load is not None and args.ckpt_step is None and args.rank == 0:
        repair_tracker(Path(args.load))
    checkpoint = checkpoint_source(args)
    if checkpoint is None:
        # The same command starts a run and resumes it.
        for name, folder in (("load", args.load), ("pretrained_checkpoint", args.pretrained_checkpoint)):
            hint = folder and _what_it_is(Path(folder))
            if folder and (hint or folder != args.save):
                remedy = hint or "name another folder, or leave it out"
                raise MoREError(f"there is no checkpoint in {flag(name)} {folder}: {remedy}")
        return
    if args.rank == 0:
        check_files(checkpoint)
        saved = stored_arguments(checkpoint)
        _check_architecture(checkpoint, saved, args)
        _check_tokenizer(checkpoint, saved, args)
        _check_optimizer(checkpoint, saved, args)
        _warn_of_changes(checkpoint, saved, args)
    check_content(checkpoint, args.rank, args.world_size)


def _what_it_is(folder: Path) -> str | None:
    """Return how to load a folder that is something else than what `--load` takes, None if it is nothing known."""
    iteration = folder.name.removeprefix("iter_")
    if folder.name != iteration and iteration.isdecimal() and folder.is_dir():
        return f"it is one of {folder.parent}, give --load {folder.parent} --ckpt-step {int(iteration)}"
    if (folder / "config.json").is_file():
        return (
            f"it is a model of transformers, convert it: tools/convert_checkpoint.py from-hf --load {folder} --save NEW"
        )
    return None


def _check_architecture(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    # Megatron fills the number of groups in while it builds the model.
    skipped = set() if args.group_query_attention else {"num_query_groups"}
    if args.finetune:
        skipped.add("more_variant")
    names = _ARCHITECTURE
    if getattr(saved, "more_variant", None) == args.more_variant:
        own = get_system(args.more_variant).architecture
        names = (*names, *own(args))
        saved, args = (argparse.Namespace(**{**vars(of), **own(of)}) for of in (saved, args))
    for change in _changes(saved, args, [name for name in names if name not in skipped]):
        raise MoREError(
            f"checkpoint {checkpoint} is of another architecture: {change}; give it the former value or another --load"
        )


def _check_optimizer(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    if args.no_load_optim or args.finetune or getattr(saved, "no_save_optim", None):
        return
    for change in _changes(saved, args, ("use_distributed_optimizer", "optimizer")):
        raise MoREError(
            f"the optimizer state of checkpoint {checkpoint} does not fit: {change}; "
            "give it the former value, or --no-load-optim to start without that state"
        )


def _check_tokenizer(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    """Refuse another tokenizer: its ids would be read with the embeddings of others, or cut the embedding."""
    was, now = getattr(saved, "tokenizer_vocab_size", None), args.tokenizer_vocab_size
    if was is None:  # A checkpoint that does not say it, from its padded size: at most so many, at least so many.
        padded = getattr(saved, "padded_vocab_size", None) or now
        multiple = getattr(saved, "make_vocab_size_divisible_by", 1) * getattr(saved, "tensor_model_parallel_size", 1)
        was = now if padded - multiple < now <= padded else padded
    was_file, now_file = getattr(saved, "tokenizer_sha256", None), args.tokenizer_sha256
    if was == now and (None in (was_file, now_file) or was_file == now_file):
        return
    model = f"{getattr(saved, 'tokenizer_type', None)} {getattr(saved, 'tokenizer_model', None) or ''}".rstrip()
    raise MoREError(
        f"checkpoint {checkpoint} was trained with another tokenizer: {model} of {was} tokens, and now "
        f"{args.tokenizer_type} {args.tokenizer_model or ''} of {now}; give it the former tokenizer or another --load"
    )


def _warn_of_changes(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    """Say what the model computes otherwise than when it was saved, and what the schedule counts otherwise."""
    names = {field.name for field in dataclasses.fields(MoREConfig)} | flag_names()
    fields = [name for name in sorted(names) if not _HOW.search(name)]
    changes = _changes(saved, args, (*fields, *_ALSO_WHAT))
    if not (args.step_batch_size_schedule is not None or checkpoint.name == "release" or args.finetune):
        batch = _changes(saved, args, ("global_batch_size",))
        changes += [f"{change}, and the schedule counts samples" for change in batch]
    for change in dict.fromkeys(changes):
        say(f"WARNING: {checkpoint}: {change}")


def _changes(saved: argparse.Namespace, args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return which of the arguments that both know are others now, each in words."""
    return [
        f"{flag(name.removeprefix('layer'))} was {getattr(saved, name)} and is {getattr(args, name)} now"
        for name in names
        if hasattr(saved, name) and hasattr(args, name) and getattr(saved, name) != getattr(args, name)
    ]
