"""Checkpoints around a run: checked before any rank loads one, saved where nothing is in the way."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.training import training
from torch.distributed.checkpoint import CheckpointException

from more_megatron.checkpoint_files import (
    checkpoint_to_load,
    clear_for_save,
    content_fault,
    fault,
    newest_complete_iteration,
    repair_tracker,
)
from more_megatron.errors import MoREError
from more_megatron.flags import flag
from more_megatron.training.former_weights import former_weights

__all__ = ["check_checkpoint", "guard_checkpoints"]

# Arguments that decide which tensors a model has, and of which shape.
_ARCHITECTURE = (
    "more_variant",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "ffn_hidden_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "recurrence_ffn_hidden_size",
    "normalization",
    "position_embedding_type",
    "swiglu",
    "add_bias_linear",
    "qk_layernorm",
    "moe_router_enable_expert_bias",
    "untie_embeddings_and_output_weights",
    "vocab_size",
)


def check_checkpoint(args: argparse.Namespace) -> None:
    """Check the checkpoint that `--load` names, if there is one.

    Rank 0 checks that all of it is there and that it is of this run. Each rank checks the content of some files. A
    tracker file that a kill left empty or unwritten is mended.

    Args:
        args: Validated arguments.

    Raises:
        MoREError: If the checkpoint is damaged or incomplete, or is one of another architecture; or if there is none
            and `--load` is not where the run saves.
    """
    if args.load is None or args.ckpt_format != "torch_dist":
        return
    folder = Path(args.load)
    if args.ckpt_step is None and args.rank == 0:
        repair_tracker(folder)
    checkpoint = checkpoint_to_load(folder, args.ckpt_step)
    if args.rank == 0:
        _check_whole(args, folder, checkpoint)
    if checkpoint is not None:
        _refuse(folder, checkpoint, content_fault(checkpoint, args.rank, args.world_size))


def _check_whole(args: argparse.Namespace, folder: Path, checkpoint: Path | None) -> None:
    if checkpoint is None:
        # The same command starts a run and resumes it.
        if args.load != args.save:
            raise MoREError(f"there is no checkpoint in --load {folder}: name another folder, or leave it out")
        return
    _refuse(folder, checkpoint, fault(checkpoint))
    saved = _saved_arguments(checkpoint)
    if saved is not None:
        _check_architecture(checkpoint, saved, args)
        _check_optimizer(checkpoint, saved, args)


def guard_checkpoints() -> None:
    """Make `pretrain` end with one line where it cannot read a checkpoint, and save only into folders that are new."""
    training.load_checkpoint = _one_line_on_failure(training.load_checkpoint)
    training.save_checkpoint = _into_a_new_folder(training.save_checkpoint)


def _one_line_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            with _weights_of_another_system(args[0]):
                return load(*args, **kwargs)
        except (Exception, CheckpointException, SystemExit) as error:
            detail = _last_line(error)
            remedy = "load an older one with --ckpt-step, or MORE_TRACEBACK=1 shows where it failed"
            if "OptimizerParamScheduler" in detail:
                remedy = "--override-opt-param-scheduler takes the schedule that the flags describe"
            raise MoREError(
                f"the checkpoint in {training.get_args().load} cannot be loaded: {detail}; {remedy}"
            ) from error

    return load_checkpoint


def _weights_of_another_system(model: list[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model asks the checkpoint that `--finetune` starts from for what both have."""
    arguments = training.get_args()
    if not arguments.finetune or arguments.load is None or arguments.ckpt_format != "torch_dist":
        return contextlib.nullcontext()
    checkpoint = checkpoint_to_load(Path(arguments.load), arguments.ckpt_step)
    saved = None if checkpoint is None else _saved_arguments(checkpoint)
    return former_weights(arguments, saved, model)


def _into_a_new_folder(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        arguments = training.get_args()
        # Other ranks write only after they have exchanged plans with rank 0.
        if arguments.rank == 0 and arguments.ckpt_format == "torch_dist" and not kwargs.get("non_persistent_ckpt"):
            clear_for_save(Path(arguments.save), iteration)
        return save(iteration, *args, **kwargs)

    return save_checkpoint


def _refuse(folder: Path, checkpoint: Path, found: str | None) -> None:
    """Refuse a checkpoint if something was found to be wrong with it."""
    if found is None:
        return
    complete = newest_complete_iteration(folder)
    if complete is not None and checkpoint == checkpoint_to_load(folder, complete):
        complete = newest_complete_iteration(folder, before=complete)
    remedy = (
        "there is no complete one beside it"
        if complete is None
        else f"--ckpt-step {complete} loads the newest complete one beside it"
    )
    raise MoREError(f"checkpoint {checkpoint} is damaged: {found}; {remedy}")


def _last_line(error: BaseException) -> str:
    """Return the kind of an error and the last line of its text: those of checkpoints hold whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no further message'}"


def _saved_arguments(checkpoint: Path) -> argparse.Namespace | None:
    try:
        with warnings.catch_warnings():
            # That it loads on one rank is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return load_common_state_dict(str(checkpoint)).get("args")
    except (Exception, CheckpointException) as error:  # whatever damaged content raises
        raise MoREError(
            f"checkpoint {checkpoint} is damaged: its arguments cannot be read ({_last_line(error)}); "
            "load an older one with --ckpt-step"
        ) from error


def _check_architecture(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    # Megatron fills the number of groups in while it builds the model.
    skipped = set() if args.group_query_attention else {"num_query_groups"}
    if args.finetune:
        skipped.add("more_variant")
    for name in _ARCHITECTURE:
        if name in skipped or not hasattr(saved, name) or not hasattr(args, name):
            continue
        was, now = getattr(saved, name), getattr(args, name)
        if was != now:
            raise MoREError(
                f"checkpoint {checkpoint} is of another architecture: {flag(name)} was {was} and is {now} now; "
                "give it the former value or another --load"
            )


def _check_optimizer(checkpoint: Path, saved: argparse.Namespace, args: argparse.Namespace) -> None:
    if args.no_load_optim or args.finetune or getattr(saved, "no_save_optim", None):
        return
    for name in ("use_distributed_optimizer", "optimizer"):
        was, now = getattr(saved, name, None), getattr(args, name)
        if was is not None and was != now:
            former = f"{flag(name)} was {was} and is {now} now"
            raise MoREError(
                f"the optimizer state of checkpoint {checkpoint} does not fit: {former}; "
                "give it the former value, or --no-load-optim to start without that state"
            )
